// Runs one launch of a kernel on a CPU (include/wave64/cpu.h): the blocks one after another, a block's waves in turn, a
// wave's lanes as fibers. Compiled together with an op's device section by wave64/testing/lanes.py.
//
// What is stricter than hardware: LDS is full of NaN when a block starts; the order of waves and lanes is reversed at
// every meeting, so that a missing barrier shows; lanes of a wave that wait for each other at different points, and
// lanes that never meet, are errors.
#include <setjmp.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "wave64/device.h"

extern "C" char __start_wave64_lds[] __attribute__((weak)), __stop_wave64_lds[] __attribute__((weak));

namespace wave64 {

Lane running;

namespace {

constexpr int kMaxLanes = 1024;
constexpr size_t kStackBytes = 1 << 18;

struct Arguments {  // passed by value as any struct of more than 16 bytes is: the kernel's own comes first in it
    char bytes[1024];
};
using Kernel = void (*)(Arguments);

enum State { kReady, kAtWave, kAtBlock, kReturned };

struct Fiber {
    jmp_buf at;
    State state;
    int kind;
    bool begun;
};

Fiber fibers[kMaxLanes];
jmp_buf scheduler;
char* stacks;
Kernel kernel;
Arguments arguments;
uint64_t brought[2][kMaxLanes];
int next_half[kMaxLanes];  // which half of `brought` a lane uses next

void leave(State state, int kind) {
    Fiber& self = fibers[running.in_block];
    self.state = state;
    self.kind = kind;
    if (_setjmp(self.at) == 0) _longjmp(scheduler, 1);
}

void begin() {
    kernel(arguments);
    fibers[running.in_block].state = kReturned;
    _longjmp(scheduler, 1);
}

void resume(int lane) {
    running.in_block = lane;
    Fiber& fiber = fibers[lane];
    if (_setjmp(scheduler)) return;
    if (fiber.begun) _longjmp(fiber.at, 1);
    fiber.begun = true;
    static ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = stacks + lane * kStackBytes;
    start.uc_stack.ss_size = kStackBytes;
    makecontext(&start, begin, 0);
    setcontext(&start);
}

// Runs a wave until each of its lanes has returned or waits for the block. Null, or what is wrong.
const char* run_wave(int first, int end, bool backwards) {
    for (;; backwards = !backwards) {
        for (int i = first; i < end; i++) {
            const int lane = backwards ? first + end - 1 - i : i;
            if (fibers[lane].state == kReady) resume(lane);
        }
        int at_wave = 0, at_block = 0, kind = -1;
        for (int lane = first; lane < end; lane++) {
            const Fiber& fiber = fibers[lane];
            at_block += fiber.state == kAtBlock;
            if (fiber.state != kAtWave) continue;
            at_wave++;
            if (kind >= 0 && fiber.kind != kind) return "lanes of a wave exchange values at different points";
            kind = fiber.kind;
        }
        if (at_wave == 0) return nullptr;
        if (at_block) return "some lanes of a wave wait at a barrier while others exchange values";
        for (int lane = first; lane < end; lane++)
            if (fibers[lane].state == kAtWave) fibers[lane].state = kReady;
    }
}

const char* run_block(int lanes) {
    if (__start_wave64_lds) memset(__start_wave64_lds, 0xff, __stop_wave64_lds - __start_wave64_lds);
    memset(brought, 0, sizeof brought);
    for (int lane = 0; lane < lanes; lane++)
        fibers[lane].state = kReady, fibers[lane].begun = false, next_half[lane] = 0;
    const int size = running.wave_size, waves = (lanes + size - 1) / size;
    for (bool backwards = false;; backwards = !backwards) {
        for (int i = 0; i < waves; i++) {
            const int first = (backwards ? waves - 1 - i : i) * size, end = first + size < lanes ? first + size : lanes;
            if (const char* wrong = run_wave(first, end, backwards)) return wrong;
        }
        bool waiting = false;
        for (int lane = 0; lane < lanes; lane++)
            if (fibers[lane].state == kAtBlock) fibers[lane].state = kReady, waiting = true;
        if (!waiting) return nullptr;
    }
}

}  // namespace

void meet_block() { leave(kAtBlock, 0); }

const uint64_t* meet_wave(int kind, uint64_t mine) {
    const int lane = running.in_block, half = next_half[lane];
    next_half[lane] ^= 1;
    brought[half][lane] = mine;
    leave(kAtWave, kind);
    return &brought[half][lane / running.wave_size * running.wave_size];
}

}  // namespace wave64

// Null, or what went wrong, in words.
extern "C" __attribute__((visibility("default"))) const char* wave64_run(void (*function)(wave64::Arguments),
                                                                         const uint32_t* grid, uint32_t lanes,
                                                                         int wave_size, const void* args, size_t size) {
    using namespace wave64;
    if (lanes > kMaxLanes || size > sizeof arguments.bytes)
        return "more lanes, or larger arguments, than the emulation has capacity for";
    if (!stacks)
        stacks = static_cast<char*>(mmap(nullptr, kMaxLanes * kStackBytes, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    kernel = function;
    memcpy(arguments.bytes, args, size);
    running.wave_size = wave_size;
    for (uint32_t y = 0; y < grid[1]; y++)
        for (uint32_t x = 0; x < grid[0]; x++) {
            running.block = int(x), running.block_y = int(y);
            static char words[200];
            if (const char* wrong = run_block(int(lanes))) {
                snprintf(words, sizeof words, "block %u of row %u: %s", x, y, wrong);
                return words;
            }
        }
    return nullptr;
}

// What the compiler calls to round to bf16 where the CPU has no instruction for it. Its own library has those of fp16,
// not these.
extern "C" __bf16 __truncsfbf2(float x) {
    uint32_t bits = __builtin_bit_cast(uint32_t, x);
    bits = x != x ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);
    return __builtin_bit_cast(__bf16, wave64::Bits16(bits >> 16));
}

// Through the float next to x toward zero, made odd where x is between two, so that only the last step rounds.
extern "C" __bf16 __truncdfbf2(double x) {
    float between = float(x);
    uint32_t bits = __builtin_bit_cast(uint32_t, between);
    if (double(between) != x && x == x) bits = (bits - (__builtin_fabs(double(between)) > __builtin_fabs(x))) | 1;
    return __truncsfbf2(__builtin_bit_cast(float, bits));
}
