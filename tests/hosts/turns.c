// Preloaded into the hosts' processes, so that many spinning threads on few processors end in bounded time.
//
// ggml's threads meet at a barrier after every node of a graph and spin there. Where they are more than the processors,
// each barrier waits until the kernel's tick takes a processor from a thread that spins: milliseconds, hundreds of times
// in a graph. Here a thread interrupts those that run much more often, the interrupted ones yield, and short time slices
// are asked for, so that they get their turn beside other programs too.
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

// Long beside the work between two barriers of a small model, short beside a tick.
static const long turn_ns = 100000;

// Nobody here uses it, and it does nothing where it is not handled.
static const int signal_number = SIGURG;

static void give_way(int number) {
    (void) number;
    int saved = errno;
    sched_yield();
    errno = saved;
}

// Whether the thread has run since it was asked about before: one that sleeps or waits is left alone.
static int has_run(pid_t thread) {
    static int64_t before[4096];
    // Linux's number of a thread's CPU clock, as pthread_getcpuclockid makes it.
    clockid_t clock = (clockid_t) ((~(uint32_t) thread << 3) | 6);
    struct timespec now;
    if (clock_gettime(clock, &now) != 0) {
        return 0;
    }
    int64_t * last = &before[thread % 4096], time = (int64_t) now.tv_sec * 1000000000 + now.tv_nsec;
    int ran = time != *last;
    *last = time;
    return ran;
}

static void * interrupt_forever(void * unused) {
    (void) unused;
    pid_t process = getpid(), own = (pid_t) syscall(SYS_gettid);
    for (;;) {
        struct timespec turn = {0, turn_ns};
        nanosleep(&turn, NULL);
        // Threads come and go with the host's pools, so the list is read anew each time.
        DIR * threads = opendir("/proc/self/task");
        if (threads == NULL) {
            return NULL;
        }
        for (struct dirent * entry; (entry = readdir(threads)) != NULL;) {
            long thread = strtol(entry->d_name, NULL, 10);
            if (thread > 0 && thread != own && has_run((pid_t) thread)) {
                syscall(SYS_tgkill, process, (pid_t) thread, signal_number);
            }
        }
        closedir(threads);
    }
}

// sched_setattr's argument. Older kernels take no slice for ordinary threads; then this is only a wish.
static void ask_for_short_slices(void) {
    struct {
        uint32_t size, policy;
        uint64_t flags;
        int32_t nice;
        uint32_t priority;
        uint64_t runtime, deadline, period;
    } attributes = {0};
    attributes.size = sizeof attributes;
    attributes.policy = SCHED_OTHER;
    attributes.nice = getpriority(PRIO_PROCESS, 0);
    attributes.runtime = (uint64_t) turn_ns;
    syscall(SYS_sched_setattr, 0, &attributes, 0);
}

__attribute__((constructor)) static void start(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = give_way;
    action.sa_flags = SA_RESTART;
    pthread_t thread;
    // A process that hangs must not outlive the tests.
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    // Threads made later inherit the slices.
    ask_for_short_slices();
    if (sigaction(signal_number, &action, NULL) == 0 && pthread_create(&thread, NULL, interrupt_forever, NULL) == 0) {
        pthread_detach(thread);
    }
}
