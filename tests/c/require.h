/* A rule that a test holds the library to: ends the process with the place, the words and the last error otherwise.
 * SPDX-License-Identifier: MIT */
#pragma once
#include "deltanet.h"

#include <stdio.h>
#include <unistd.h>

#define REQUIRE(rule, ...)                                             \
    do {                                                               \
        if (!(rule)) {                                                 \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #rule); \
            fprintf(stderr, __VA_ARGS__);                              \
            fprintf(stderr, "; last: %s\n", deltanet_last_error());    \
            _exit(1);                                                  \
        }                                                              \
    } while (0)
