#include "model/config.h"

#include <math.h>

static stv_status in_range(const char *key, int64_t value, int64_t low, int64_t high)
{
    if (value >= low && value <= high) return STV_OK;
    return stv_fail(STV_ERR_ARGUMENT, "config: %s is %lld, want %lld..%lld", key, (long long)value, (long long)low, (long long)high);
}

static stv_status is_size(const char *key, int64_t value) { return in_range(key, value, 1, 1 << 24); }

static stv_status is_positive(const char *key, double value)
{
    if (value > 0 && isfinite(value)) return STV_OK;
    return stv_fail(STV_ERR_ARGUMENT, "config: %s is %g, want a positive number", key, value);
}

static stv_status divides(const char *key, int64_t value, const char *by_key, int64_t by)
{
    if (value % by == 0) return STV_OK;
    return stv_fail(STV_ERR_ARGUMENT, "config: %s %lld is not a multiple of %s %lld", key, (long long)value, by_key, (long long)by);
}

static stv_status is_equal(const char *key, int64_t value, const char *other_key, int64_t other)
{
    if (value == other) return STV_OK;
    return stv_fail(STV_ERR_ARGUMENT, "config: %s is %lld, but %s is %lld; they must be equal", key, (long long)value, other_key, (long long)other);
}

static stv_status check_vision(const stv_vision_config *v)
{
    STV_TRY(is_size("vision.image_size", v->image_size));
    STV_TRY(is_size("vision.patch_size", v->patch_size));
    STV_TRY(divides("vision.image_size", v->image_size, "vision.patch_size", v->patch_size));
    STV_TRY(in_range("vision.image_size", v->image_size, 1, 4096 * v->patch_size));
    STV_TRY(is_size("vision.hidden_size", v->hidden_size));
    STV_TRY(in_range("vision.n_layers", v->n_layers, 1, 4096));
    STV_TRY(is_size("vision.n_heads", v->n_heads));
    STV_TRY(divides("vision.hidden_size", v->hidden_size, "vision.n_heads", v->n_heads));
    STV_TRY(is_size("vision.intermediate_size", v->intermediate_size));
    STV_TRY(in_range("vision.activation", v->activation, 0, 1));
    STV_TRY(is_positive("vision.layer_norm_eps", v->layer_norm_eps));
    return in_range("vision.select_layer", v->select_layer, -(v->n_layers + 1), v->n_layers);
}

static stv_status check_projector(const stv_projector_config *p)
{
    STV_TRY(in_range("projector.kind", (int64_t)p->kind, STV_PROJECTOR_IDENTITY, STV_PROJECTOR_CLUSTER));
    STV_TRY(is_size("projector.in_size", p->in_size));
    STV_TRY(is_size("projector.out_size", p->out_size));
    if (p->kind == STV_PROJECTOR_IDENTITY) STV_TRY(is_equal("projector.in_size", p->in_size, "projector.out_size of an identity", p->out_size));
    if (p->kind == STV_PROJECTOR_MLP) STV_TRY(in_range("projector.depth", p->depth, 1, STV_MAX_PROJECTOR_DEPTH));
    if (p->kind == STV_PROJECTOR_CLUSTER) {
        STV_TRY(is_size("projector.n_centers", p->n_centers));
        STV_TRY(in_range("projector.n_rounds", p->n_rounds, 1, 64));
    }
    return STV_OK;
}

static stv_status check_decoder(const stv_decoder_config *d)
{
    STV_TRY(is_size("decoder.vocab_size", d->vocab_size));
    STV_TRY(is_size("decoder.hidden_size", d->hidden_size));
    STV_TRY(in_range("decoder.n_layers", d->n_layers, 1, 4096));
    STV_TRY(is_size("decoder.n_heads", d->n_heads));
    STV_TRY(is_size("decoder.n_kv_heads", d->n_kv_heads));
    STV_TRY(divides("decoder.n_heads", d->n_heads, "decoder.n_kv_heads", d->n_kv_heads));
    STV_TRY(in_range("decoder.head_dim", d->head_dim, 2, 1 << 16));
    STV_TRY(divides("decoder.head_dim", d->head_dim, "the two halves of a rotary pair,", 2));
    STV_TRY(is_size("decoder.intermediate_size", d->intermediate_size));
    STV_TRY(is_positive("decoder.rms_norm_eps", d->rms_norm_eps));
    STV_TRY(is_positive("decoder.rope_theta", d->rope_theta));
    return in_range("decoder.sliding_window", d->sliding_window, 0, INT32_MAX);
}

stv_status stv_config_check(const stv_model_config *c)
{
    if (!c->has_vision && !c->has_projector && !c->has_decoder)
        return stv_fail(STV_ERR_ARGUMENT, "config: no part; want at least one of vision, projector, decoder");
    if (c->has_vision) STV_TRY(check_vision(&c->vision));
    if (c->has_projector) STV_TRY(check_projector(&c->projector));
    if (c->has_decoder) STV_TRY(check_decoder(&c->decoder));
    if (c->has_vision && c->has_decoder && !c->has_projector)
        return stv_fail(STV_ERR_ARGUMENT, "config: a tower and a decoder need a projector between them (kind identity if the widths agree)");
    if (c->has_vision && c->has_projector) STV_TRY(is_equal("projector.in_size", c->projector.in_size, "vision.hidden_size", c->vision.hidden_size));
    if (c->has_projector && c->has_decoder)
        STV_TRY(is_equal("projector.out_size", c->projector.out_size, "decoder.hidden_size", c->decoder.hidden_size));
    if (c->has_vision && c->has_projector && c->projector.kind == STV_PROJECTOR_CLUSTER)
        STV_TRY(in_range("projector.n_centers (at most the tokens of an image)", c->projector.n_centers, 1, stv_config_tokens_per_image(c)));
    return STV_OK;
}

int64_t stv_config_n_patches(const stv_vision_config *v)
{
    int64_t side = v->image_size / v->patch_size;
    return side * side;
}

int64_t stv_config_n_layers_used(const stv_vision_config *v) { return v->select_layer < 0 ? v->n_layers + 1 + v->select_layer : v->select_layer; }

int64_t stv_config_tokens_per_image(const stv_model_config *c)
{
    return c->has_vision ? stv_config_n_patches(&c->vision) + (c->vision.select_class ? 1 : 0) : 0;
}
