#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char last_error[1024];

stv_status stv_fail(stv_status code, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    (void)vsnprintf(last_error, sizeof last_error, fmt, args);
    va_end(args);
    return code;
}

const char *stv_last_error(void) { return last_error; }
