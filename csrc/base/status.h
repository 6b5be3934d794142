/* status.h - how the core says that something went wrong.
 *
 * Every fallible function returns an stv_status; the text that belongs to it is kept in one
 * thread-local message. Nothing in the core prints, aborts or exits. Worker threads return
 * codes and never call stv_fail: only the calling thread owns a message. */
#ifndef STV_BASE_STATUS_H
#define STV_BASE_STATUS_H

typedef enum stv_status {
    STV_OK = 0,
    STV_ERR_ARGUMENT = 10,    /* a value out of range or of the wrong kind */
    STV_ERR_SHAPE = 11,       /* sizes that do not fit together */
    STV_ERR_DTYPE = 12,       /* element type not the wanted one */
    STV_ERR_NAME = 13,        /* no such tensor, module or option */
    STV_ERR_STATE = 14,       /* right call, wrong moment (e.g. backward without forward) */
    STV_ERR_INTERRUPTED = 15, /* the caller's poll asked to stop (watch.h); results are lost, inputs unharmed */
    STV_ERR_MEMORY = 20,      /* allocation failed */
    STV_ERR_FILE = 30,        /* the operating system refused */
    STV_ERR_FORMAT = 31,      /* bytes that are not what they should be */
    STV_ERR_NUMERIC = 40,     /* NaN or Inf where a number is needed */
    STV_ERR_DEVICE = 50,      /* an accelerator failed */
    STV_ERR_UNSUPPORTED = 60, /* known, but not implemented here */
    STV_ERR_INTERNAL = 70     /* a promise of ours was broken: please report */
} stv_status;

/* Stores the formatted message of this thread and returns `code`. */
stv_status stv_fail(stv_status code, const char *fmt, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 2, 3)))
#endif
    ;

/* The message of the last failure on this thread; "" if there was none. Valid until the next failure. */
const char *stv_last_error(void);

#define STV_TRY(expr) \
    do { \
        stv_status stv_try_status_ = (expr); \
        if (stv_try_status_ != STV_OK) return stv_try_status_; \
    } while (0)

#endif
