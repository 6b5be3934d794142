/* check_cpu.h - a test's cases at every lower cpu level: STLLAVA_CPU is read once a process, so each level is a process. The including file defines
 * _POSIX_C_SOURCE 200809L first, and its main sets check_program. */
#ifndef STV_TESTS_CHECK_CPU_H
#define STV_TESTS_CHECK_CPU_H

#include "base/cpu.h"
#include "check.h"

#include <sys/wait.h>
#include <unistd.h>

static const char *check_program;

static inline void check_lower_cpu_levels(void)
{
    if (getenv("STLLAVA_CPU")) {
        check_skip("this process is one of the levels");
        CHECK(strcmp(stv_cpu_level_name(stv_cpu()), getenv("STLLAVA_CPU")) == 0);
        return;
    }
    for (int level = 0; level < (int)stv_cpu(); level++) {
        pid_t child = fork();
        if (child == 0) {
            setenv("STLLAVA_CPU", stv_cpu_level_name((stv_cpu_level)level), 1);
            execl(check_program, check_program, (char *)NULL);
            _exit(127);
        }
        int status = -1;
        CHECK(child > 0 && waitpid(child, &status, 0) == child);
        CHECK_INT(status, 0);
    }
}

#endif
