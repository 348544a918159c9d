// LDS: loads and stores under the checks of races, of what was written and of stores on their way at a barrier; lane
// exchanges through the LDS unit. Op: src[0] the lanes' addresses, dst what is loaded or stored, mask the second
// store's.

enum { READ, WRITE, ATOMIC };

// offsets into the LDS of all workgroups, at `offset` from the lanes' addresses
static int lds_offsets(Core* c, const Op* o, i64 offset, u32 width) {
    if (c->special) return NUMPY;
    i32* to = c->at;
    WAVES {
        const u32* lanes = vector(c, o->src[0].reg, w);
        u64 exec = exec_of(c, w), most = 0;
        i64 begin = w / c->group_waves * c->lds_stride + offset;
        for (int i = 0; i < LANES; i++) {
            u64 at = exec >> i & 1 ? lanes[i] : 0;
            most = at > most ? at : most;
            to[p * LANES + i] = (i32)(begin + (i64)lanes[i]);
        }
        if (exec && (i64)most + offset + width > c->lds_bytes) return NUMPY;
        if (c->direct_due)  // words that loads past the registers bring, and no wait has seen done
            EACH(exec, for (i64 x = to[p * LANES + i] & -4; x < to[p * LANES + i] + (i64)width;
                            x += 4) if (c->direct_due[x] > c->done[0][c->direct_by[x]]) return NUMPY;)
    }
    return OK;
}
static u32 unit_of(const i32* at, u64 lanes, u32 width) {  // bytes that can be looked at at once
    u32 all = width | 8;
    EACH(lanes, all |= (u32)at[i];)
    return all & -all;
}
// clang-format off: macros of loops
// whether no other wave did `kind` with these bytes: none did, or this one alone
#define AT(T, array, x) (*(T *)((array) + (x)))
#define ALONE(T, kind, x) \
    ({ T last = AT(T, last_##kind, x); !last || (last == mine && AT(T, first_##kind, x) == mine); })
#define UNITS(T, ...) EACH(exec, for (u32 k = 0; k < width; k += sizeof(T)) { i64 x = at[i] + k; __VA_ARGS__ })
#define READS(T)                                                                                      \
    UNITS(T, if (!ALONE(T, WRITE, x) || (atomics && !ALONE(T, ATOMIC, x))) return NUMPY;              \
          T before = AT(T, first_READ, x);                                                            \
          if (!before) AT(T, first_READ, x) = mine;                                                   \
          else if (before != mine)                                                                    \
              for (u32 b = 0; b < sizeof(T); b++) if (!first_READ[x + b]) first_READ[x + b] = (u8)mine; \
          AT(T, last_READ, x) = mine;)
#define LOOKS(T) \
    UNITS(T, if (!ALONE(T, READ, x) || !ALONE(T, WRITE, x) || (atomics && !ALONE(T, ATOMIC, x))) return NUMPY;)
#define WRITES(T)                                                                                     \
    UNITS(T, T before = AT(T, last_WRITE, x);                                                         \
          if (!before) AT(T, first_WRITE, x) = mine; else clash |= before != mine;                     \
          AT(T, last_WRITE, x) = mine;)
#define FORGETS(T) UNITS(T, AT(T, first_WRITE, x) = 0; AT(T, last_WRITE, x) = 0;)
#define FINDS(T) UNITS(T, if (AT(T, written, x) != ones) fresh &= ~(1ull << i);)
#define FILLS(T) UNITS(T, AT(T, written, x) = ones;)
#define BY_UNIT_OF(T, DO) { T mine = (T)mark, ones = (T)0x0101010101010101ull; (void)mine; (void)ones; DO(T) break; }
#define OF_KIND(kind) u8 *first_##kind = c->first[kind], *last_##kind = c->last[kind]; (void)first_##kind; (void)last_##kind;
// for all waves of the party, as many bytes at a time as the addresses allow
#define BY_UNIT(DO)                                                                                   \
    WAVES {                                                                                           \
        const i32 *at = c->at + p * LANES;                                              \
        u64 exec = exec_of(c, w), mark = (u64)(w % c->group_waves + 1) * 0x0101010101010101ull;       \
        u64 fresh = c->fresh[p];                                                                      \
        u8 *written = c->written; (void)written;                                                      \
        OF_KIND(READ) OF_KIND(WRITE) OF_KIND(ATOMIC)                                                  \
        switch (unit_of(at, exec, width)) {                                                           \
        case 8: BY_UNIT_OF(u64, DO)                                                                   \
        case 4: BY_UNIT_OF(u32, DO)                                                                   \
        case 2: BY_UNIT_OF(u16, DO)                                                                   \
        default: BY_UNIT_OF(u8, DO)                                                                   \
        }                                                                                             \
        c->fresh[p] = fresh;                                                                          \
    }
// clang-format on
static void soil(Core* c, u32 width) {  // these bytes' accesses are no longer all 0
    WAVES {
        const i32* at = c->at + p * LANES;
        u64 exec = exec_of(c, w);
        EACH(exec, c->dirty[at[i] >> 8] = 1; c->dirty[(at[i] + (i32)width - 1) >> 8] = 1;)
    }
}
static int may_read(Core* c, u32 width) {
    if (c->first[READ]) {
        int atomics = *c->atomics;
        soil(c, width);
        BY_UNIT(READS)
    }
    if (c->written) BY_UNIT(FINDS)
    return OK;
}
// clashes: gets whether waves of this instruction store to the same bytes; direct: what stores is a load
static int may_write(Core* c, u32 width, int direct, int* clashes) {
    if (c->stores && !direct && c->stored + c->count > c->store_capacity) {  // forget the stores that were waited for
        i64 kept = 0;
        for (i64 k = 0; k < c->stored; k++)
            if (c->stores[k].count > c->done[1][c->stores[k].wave]) c->stores[kept++] = c->stores[k];
        c->stored = kept;
        if (kept + c->count > c->store_capacity) return NUMPY;
    }
    if (c->first[READ]) {
        int atomics = *c->atomics;
        BY_UNIT(LOOKS)
        soil(c, width);
        int clash = 0;
        BY_UNIT(WRITES)
        *clashes = clash;
    }
    if (c->written) BY_UNIT(FILLS)
    if (c->stores && !direct) WAVES {
            Stored* s = c->stores + c->stored++;
            s->count = c->issued[1][w] + 1, s->lanes = exec_of(c, w), s->wave = (i32)w, s->width = (i32)width;
            __builtin_memcpy(s->offset, c->at + p * LANES, sizeof s->offset);
        }
    return OK;
}
static void addresses_of_lds(Core* c, i64 p, u64* to) {
    const i32* at = c->at + p * LANES;
    LOOP to[i] = (u64)c->lds + (u64)at[i];
}
int lds_read(Core* c, const Op* o) {
    u32 width = o->more & 31;
    if (lds_offsets(c, o, o->imm, width) != OK || may_read(c, width) != OK) return NUMPY;
    WAVES {
        u64 address[LANES];
        addresses_of_lds(c, p, address);
        receive(c, o, w, address, exec_of(c, w));
    }
    return OK;
}
int lds_read2(Core* c, const Op* o) {
    u32 width = o->more & 31, words = width / 4;
    i64 offset[2] = {o->imm & 0xFFFF, o->imm >> 16 & 0xFFFF};
    for (int half = 0; half < 2; half++)
        if (lds_offsets(c, o, offset[half], width) != OK || may_read(c, width) != OK) return NUMPY;
    WAVES {  // both are loaded before one is written: the address may be a register of the result
        u64 address[LANES];
        i64 apart = offset[0] - offset[1];
        Lanes got[4];
        u64 exec = exec_of(c, w);
        addresses_of_lds(c, p, address);
        for (u32 k = 0; k < 2 * words; k++) {
            i64 from = (k < words ? apart : 0) + 4 * (k % words);
            EACH(exec, got[k].u[i] = *(u32*)(address[i] + (u64)from);)
        }
        for (u32 k = 0; k < 2 * words; k++) blend(vector(c, o->dst + k, w), got[k].u, exec);
    }
    return OK;
}
static void forget_stores(Core* c, u32 width) { BY_UNIT(FORGETS) }
static int store_lds(Core* c, const Op* o, i64 offset, u16 data) {
    u32 width = o->more & 31;
    int clashes = 0;
    if (lds_offsets(c, o, offset, width) != OK || may_write(c, width, 0, &clashes) != OK) return NUMPY;
    Op one = *o;
    one.dst = data;
    WAVES {
        u64 address[LANES];
        addresses_of_lds(c, p, address);
        if (c->counting) c->changes[1] += !holds(c, &one, w, address, exec_of(c, w), width);
        give(c, &one, w, address, exec_of(c, w), width);
    }
    if (clashes) WAVES {
            u64 address[LANES];
            addresses_of_lds(c, p, address);
            if (holds(c, &one, w, address, exec_of(c, w), width)) continue;
            forget_stores(c, width);  // values differ: NumPy notes all of them again, and looks whose
            return NUMPY;
        }
    return OK;
}
int lds_write(Core* c, const Op* o) { return store_lds(c, o, o->imm, o->dst); }
int lds_write2(Core* c, const Op* o) {
    if (store_lds(c, o, o->imm & 0xFFFF, o->dst) != OK) return NUMPY;
    return store_lds(c, o, o->imm >> 16 & 0xFFFF, o->mask);
}

// gfx950: 16 lanes load rows of 16 numbers of so many bits, and get a column each
#define TRANSPOSED(T)                    \
    for (int row = 0; row < rows; row++) \
        for (int column = 0; column < 16; column++) ((T*)turned)[column * rows + row] = ((T*)held)[row * 16 + column];
int lds_read_transposed(Core* c, const Op* o) {
    int bits = o->more, rows = 64 / bits;
    WAVES if (exec_of(c, w) != ALL) return NUMPY;
    if (lds_offsets(c, o, o->imm, 8) != OK) return NUMPY;
    WAVES for (int i = 0; i < LANES; i++) if (c->at[p * LANES + i] & 7) return NUMPY;
    if (may_read(c, 8) != OK) return NUMPY;
    WAVES for (int first = 0; first < LANES; first += 16) {
        u64 held[16], turned[16] = {0};
        for (int i = 0; i < 16; i++) held[i] = *(u64*)(c->lds + c->at[p * LANES + first + i]);
        if (bits == 16) {
            TRANSPOSED(u16)
        } else if (bits == 8) {
            TRANSPOSED(u8)
        } else
            for (int k = 0; k < 256; k++) turned[k % 16] |= (held[k / 16] >> 4 * (k % 16) & 15) << 4 * (k / 16);
        for (int i = 0; i < 16; i++) {
            vector(c, o->dst, w)[first + i] = (u32)turned[i];
            vector(c, o->dst + 1, w)[first + i] = (u32)(turned[i] >> 32);
        }
    }
    return OK;
}

// ---- loads past the registers: lane i's bytes to M0 + dst + i * width, from where memory.h has put the addresses

static int deposit(Core* c, const Op* o, int buffer) {
    u32 width = o->more & 31, room = width < 4 ? 4 : width;
    if (c->special || c->counting || (c->issued[0] && !c->direct_due)) return NUMPY;
    WAVES {
        i64 base = (i64)scalars(c, w)[M0] + o->dst, begin = w / c->group_waves * c->lds_stride + base;
        if ((begin | o->dst) & 3 || base + LANES * room > c->lds_bytes) return NUMPY;
        for (int i = 0; i < LANES; i++) c->at[p * LANES + i] = (i32)(begin + i * room);
    }
    int clashes = 0;
    if (may_write(c, room, 1, &clashes) != OK) return NUMPY;
    for (int pass = 0; pass < 1 + clashes; pass++) WAVES {  // the second sees whether waves stored the same
            const u64* address = c->addresses + p * LANES;
            const i64* left = (i64*)c->addresses + (c->count + p) * LANES;
            u64 exec = exec_of(c, w);
            EACH(
                exec, u32 words[4] = {0}; u32 unit = room == 4 ? width : 4;
                for (u32 k = 0; k < width; k += unit) if (!buffer || left[i] >= k + unit)
                    __builtin_memcpy((u8*)words + k, (u8*)address[i] + k, unit);
                i64 x = c->at[p * LANES + i]; if (pass && __builtin_memcmp(c->lds + x, words, room)) {
                    forget_stores(c, room);
                    return NUMPY;
                } __builtin_memcpy(c->lds + x, words, room);
                for (u32 k = 0; c->direct_due && k < room; k++) c->direct_due[x + k] = c->issued[0][w] + 1,
                c->direct_by[x + k] = w;)
        }
    return OK;
}
int global_load_lds(Core* c, const Op* o) { return global_addresses(c, o, 0) == OK ? deposit(c, o, 0) : NUMPY; }
int buffer_load_lds(Core* c, const Op* o) { return buffer_addresses(c, o, 0) == OK ? deposit(c, o, 1) : NUMPY; }

// ---- exchanges: src[0] addresses or data, src[1] data

int ds_bpermute_b32(Core* c, const Op* o) {
    WAVES {
        const u32 *lanes = vector(c, o->src[0].reg, w), *data = vector(c, o->src[1].reg, w);
        u64 exec = exec_of(c, w);
        Lanes got;
        for (int i = 0; i < LANES; i++) {
            u32 from = (lanes[i] + (u32)o->imm) >> 2 & 63;
            got.u[i] = exec >> from & 1 ? data[from] : 0;
        }
        blend(vector(c, o->dst, w), got.u, exec);
    }
    return OK;
}
int ds_permute_b32(Core* c, const Op* o) {
    WAVES {
        const u32 *lanes = vector(c, o->src[0].reg, w), *data = vector(c, o->src[1].reg, w);
        u64 exec = exec_of(c, w);
        Lanes got = {0};
        EACH(exec, got.u[(lanes[i] + (u32)o->imm) >> 2 & 63] = data[i];)
        blend(vector(c, o->dst, w), got.u, exec);
    }
    return OK;
}
int ds_swizzle_b32(Core* c, const Op* o) {
    const u8* source = c->exchanges[o->more].lane;
    WAVES {
        const u32* data = vector(c, o->src[0].reg, w);
        u64 exec = exec_of(c, w);
        Lanes got;
        for (int i = 0; i < LANES; i++) got.u[i] = exec >> source[i] & 1 ? data[source[i]] : 0;
        blend(vector(c, o->dst, w), got.u, exec);
    }
    return OK;
}
