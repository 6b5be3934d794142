#include "base/exec.h"

#include "base/watch.h"

stv_status stv_exec_run(stv_pool *pool, stv_arena *arena, stv_exec_body *body, void *context, const char *what)
{
    stv_arena measuring;
    stv_arena_init_measuring(&measuring);
    body(&(stv_exec){pool, &measuring}, context);
    STV_TRY(stv_arena_reserve(arena, measuring.peak));
    body(&(stv_exec){pool, arena}, context);
    return stv_check_stopped(what);
}
