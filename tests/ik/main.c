/* Starts the engine's operator with the head size given. */
#include <stdlib.h>

int engine_main(int S);

int main(int argc, char **argv) {
    return engine_main(argc > 1 ? atoi(argv[1]) : 64);
}
