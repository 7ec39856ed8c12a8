/* Prints the version that the header has and the one that the library has. SPDX-License-Identifier: MIT */
#include "deltanet.h"

#include <stdio.h>

#if DELTANET_VERSION < 1000
#error "the preprocessor must be able to compare versions"
#endif

int main(void) {
    printf("%d.%d.%d %u %u %s\n", DELTANET_VERSION_MAJOR, DELTANET_VERSION_MINOR, DELTANET_VERSION_PATCH,
           (unsigned) DELTANET_VERSION, (unsigned) deltanet_version(), deltanet_version_string());
    return 0;
}
