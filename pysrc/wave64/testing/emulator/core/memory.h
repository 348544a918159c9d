// Memory instructions besides LDS, in two passes: where all lanes of all waves go, which must lie inside the registered
// buffers; then the accesses. Op: dst the data, imm the offset, more the bytes of an access and what a load makes of
// them.

enum { SIGNED = 32, LOW_HALF = 64, HIGH_HALF = 128 };  // in `more`, above the width

#define EACH(lanes, ...)                                       \
    if ((lanes) == ALL)                                        \
        for (int i = 0; i < LANES; i++) {                      \
            __VA_ARGS__                                        \
        }                                                      \
    else                                                       \
        for (u64 left_ = (lanes); left_; left_ &= left_ - 1) { \
            int i = __builtin_ctzll(left_);                    \
            __VA_ARGS__                                        \
        }

// ---- registered buffers

static int inside_range(const Core* c, i64 k, u64 low, u64 high, int writes) {
    const u64 *start = writes ? c->store_start : c->load_start, *end = writes ? c->store_end : c->load_end;
    return k >= 0 && k < c->ranges && low >= start[k] && high <= end[k];
}
static i64 range_of(const Core* c, u64 address, int writes) {  // the last that begins at or before it; -1
    const u64* start = writes ? c->store_start : c->load_start;
    i64 low = 0, high = c->ranges;
    while (low < high) {
        i64 mid = (low + high) / 2;
        if (start[mid] <= address)
            low = mid + 1;
        else
            high = mid;
    }
    return low - 1;
}
static int inside(const Core* c, u64 address, u64 width, int writes) {
    return address + width >= width && inside_range(c, range_of(c, address, writes), address, address + width, writes);
}
static int all_inside(const Core* c, const u64* address, u64 lanes, u64 width, int writes) {
    if (!lanes) return 1;
    u64 low = ~0ull, high = 0;
    EACH(lanes, low = address[i] < low ? address[i] : low; high = address[i] > high ? address[i] : high;)
    if (high + width >= width && inside_range(c, range_of(c, low, writes), low, high + width, writes)) return 1;
    EACH(lanes, if (!inside(c, address[i], width, writes)) return 0;)
    return 1;
}

// ---- registers

// Memory may be another process's, too, whose device loads meanwhile: pairs of words are never torn, and `receive`
// takes them in the reverse of the order in which `give` stores them, so that who finds the last pair of a store finds
// all of it, as a line that hardware stores as one.
typedef struct {
    u64 bits __attribute__((aligned(4)));
} __attribute__((packed, aligned(4))) Pair;

static void receive(Core* c, const Op* o, i64 w, const u64* address, u64 lanes) {
    u32 width = o->more & 31;
    u32* to = vector(c, o->dst, w);
    if (o->more & (LOW_HALF | HIGH_HALF)) {
        u16* half = (u16*)to + (o->more & HIGH_HALF ? 1 : 0);
        if (width == 2)
            EACH(lanes, half[2 * i] = *(u16*)address[i];)
        else if (o->more & SIGNED)
            EACH(lanes, half[2 * i] = (u16) * (i8*)address[i];)
        else
            EACH(lanes, half[2 * i] = *(u8*)address[i];)
    } else if (width == 1) {
        if (o->more & SIGNED)
            EACH(lanes, to[i] = (u32) * (i8*)address[i];)
        else
            EACH(lanes, to[i] = *(u8*)address[i];)
    } else if (width == 2) {
        if (o->more & SIGNED)
            EACH(lanes, to[i] = (u32) * (i16*)address[i];)
        else
            EACH(lanes, to[i] = *(u16*)address[i];)
    } else if (width % 8 == 0) {
        for (int i = LANES - 1; i >= 0; i--)
            if (lanes >> i & 1)
                for (i64 k = width / 8 - 1; k >= 0; k--) {
                    u64 pair = ((volatile Pair*)address[i])[k].bits;
                    to[2 * k * c->n * LANES + i] = (u32)pair;
                    to[(2 * k + 1) * c->n * LANES + i] = (u32)(pair >> 32);
                }
    } else
        for (u32 k = 0; k < width / 4; k++, to += c->n * LANES) EACH(lanes, to[i] = ((u32*)address[i])[k];)
}
// stores the words that begin at `from`; which: of them
static void give(Core* c, const Op* o, i64 w, const u64* address, u64 lanes, u32 width) {
    const u32* from = vector(c, o->dst, w);
    int high = o->more & HIGH_HALF ? 16 : 0;
    if (width == 1)
        EACH(lanes, *(u8*)address[i] = (u8)(from[i] >> high);)
    else if (width == 2)
        EACH(lanes, *(u16*)address[i] = (u16)(from[i] >> high);)
    else if (width % 8 == 0)
        EACH(lanes, for (u32 k = 0; k < width / 8; k++)((volatile Pair*)address[i])[k].bits =
                        from[2 * k * c->n * LANES + i] | (u64)from[(2 * k + 1) * c->n * LANES + i] << 32;)
    else
        for (u32 k = 0; k < width / 4; k++, from += c->n * LANES) EACH(lanes, ((u32*)address[i])[k] = from[i];)
}
static int holds(Core* c, const Op* o, i64 w, const u64* address, u64 lanes, u32 width) {
    const u32* from = vector(c, o->dst, w);
    int high = o->more & HIGH_HALF ? 16 : 0;
    u32 other = 0;
    if (width == 1) {
        EACH(lanes, other |= *(u8*)address[i] ^ (from[i] >> high & 0xFF);)
    } else if (width == 2) {
        EACH(lanes, other |= *(u16*)address[i] ^ (from[i] >> high & 0xFFFF);)
    } else
        for (u32 k = 0; k < width / 4; k++, from += c->n * LANES) {
            EACH(lanes, other |= ((u32*)address[i])[k] ^ from[i];)
        }
    return !other;
}
// after all addresses are known to be inside: a store of all waves, and whether what lanes stored is there
static int store_all(Core* c, const Op* o, int space) {
    u32 width = o->more & 31;
    WAVES {
        const u64* address = c->addresses + p * LANES;
        if (c->counting) c->changes[space] += !holds(c, o, w, address, exec_of(c, w), width);
        give(c, o, w, address, exec_of(c, w), width);
    }
    if (c->one_value && space == 0)
        WAVES if (!holds(c, o, w, c->addresses + p * LANES, exec_of(c, w), width)) return NUMPY;
    return OK;
}

// ---- global and flat; scratch

// the immediate, and the scalar operand that is added to it
static i64 scalar_offset(const Core* c, const Op* o, i64 w) {
    return o->imm + (o->src[1].kind == NONE ? 0 : (i64)(u32)scalar_bits(c, o->src + 1, w, 4));
}
static int global_addresses(Core* c, const Op* o, int writes) {
    i64 offset = o->imm;
    WAVES {
        u64* to = c->addresses + p * LANES;
        const u32* low = vector(c, o->src[0].reg, w);
        if (o->src[1].kind == NONE) {
            const u32* high = vector(c, o->src[0].reg + 1, w);
            LOOP to[i] = (low[i] | (u64)high[i] << 32) + (u64)offset;
        } else {
            u64 base = scalar_bits(c, o->src + 1, w, 8) + (u64)offset;
            LOOP to[i] = low[i] + base;
        }
        if (!all_inside(c, to, exec_of(c, w), o->more & 31, writes)) return NUMPY;
    }
    return OK;
}
int global_load(Core* c, const Op* o) {
    if (global_addresses(c, o, 0) != OK) return NUMPY;
    WAVES receive(c, o, w, c->addresses + p * LANES, exec_of(c, w));
    return OK;
}
int global_store(Core* c, const Op* o) { return global_addresses(c, o, 1) == OK ? store_all(c, o, 0) : NUMPY; }
static int scratch_addresses(Core* c, const Op* o, int writes) {
    i64 width = o->more & 31;
    WAVES {
        u64 *to = c->addresses + p * LANES, exec = exec_of(c, w);
        i64 base = scalar_offset(c, o, w);
        const u32* lanes = o->src[0].kind == NONE ? NULL : vector(c, o->src[0].reg, w);
        for (int i = 0; i < LANES; i++) {
            i64 at = base + (lanes ? lanes[i] : 0);
            if (exec >> i & 1 && !(at >= 0 && at + width <= c->scratch_bytes)) return NUMPY;
            to[i] = (u64)c->scratch + (u64)((w * LANES + i) * c->scratch_bytes + at);
        }
        if (!c->private) continue;
        for (int i = 0; i < LANES; i++)
            if (exec >> i & 1) {
                u8 *written = c->private + (to[i] - (u64)c->scratch), all = 1;
                for (i64 k = 0; k < width; k++) writes ? written[k] = 1 : (all &= written[k]);
                if (!all) c->fresh[p] &= ~(1ull << i);
            }
    }
    return OK;
}
int scratch_load(Core* c, const Op* o) {
    if (scratch_addresses(c, o, 0) != OK) return NUMPY;
    WAVES receive(c, o, w, c->addresses + p * LANES, exec_of(c, w));
    return OK;
}
int scratch_store(Core* c, const Op* o) { return scratch_addresses(c, o, 1) == OK ? store_all(c, o, 0) : NUMPY; }

// ---- scalar loads

int scalar_load(Core* c, const Op* o) {
    u32 words = o->more;
    WAVES {
        c->addresses[p] = (pair(c, w, o->src[0].reg) + (u64)scalar_offset(c, o, w)) & ~3ull;
        if (!inside(c, c->addresses[p], 4 * words, 0)) return NUMPY;
    }
    WAVES for (u32 k = 0; k < words; k++) scalars(c, w)[o->dst + k] = ((u32*)c->addresses[p])[k];
    return OK;
}
int scalar_buffer_load(Core* c, const Op* o) {
    u32 words = o->more;
    WAVES {
        u64 base = pair(c, w, o->src[0].reg), offset = (u64)(scalar_offset(c, o, w) & -4);
        if (base >> 48) return NUMPY;
        c->addresses[2 * p] = base + offset;
        i64 left = (i64)scalars(c, w)[o->src[0].reg + 2] - (i64)offset;
        c->addresses[2 * p + 1] = left < 0 ? 0 : (u64)left / 4;
        for (u32 k = 0; k < words && k < c->addresses[2 * p + 1]; k++)
            if (!inside(c, base + offset + 4 * k, 4, 0)) return NUMPY;
    }
    WAVES for (u32 k = 0; k < words; k++) scalars(c, w)[o->dst + k] =
        k < c->addresses[2 * p + 1] ? ((u32*)c->addresses[2 * p])[k] : 0;
    return OK;
}

// ---- buffers: src index, lanes' offset, scalar offset; then the first register of the resource

// addresses, and behind them how many bytes of the resource are left at each; NUMPY: what it refuses or reports.
// what: gets, by wave, the lanes with a word inside
static int buffer_addresses(Core* c, const Op* o, int writes) {
    u32 width = o->more & 31, unit = width < 4 ? width : 4;
    i64* lefts = (i64*)c->addresses + c->count * LANES;
    WAVES {
        const u32* resource = scalars(c, w) + o->src[3].reg;
        u32 high = resource[1], records = resource[2], kind = resource[3], swizzled = high >> 31,
            stride = high >> 16 & 0x3FFF;
        int indexed = o->src[0].kind != NONE;
        if (kind >> 23 & 1 || (indexed ? !stride || (swizzled && width > 4) : swizzled)) return NUMPY;
        u64 base = resource[0] | (u64)(high & 0xFFFF) << 32, exec = exec_of(c, w), whole = 0;
        i64 scalar = (i64)(u32)scalar_bits(c, o->src + 2, w, 4), together = 8ll << (kind >> 21 & 3);
        const u32* lanes = o->src[1].kind == NONE ? NULL : vector(c, o->src[1].reg, w);
        const u32* index = indexed ? vector(c, o->src[0].reg, w) : NULL;
        u64* to = c->addresses + p * LANES;
        i64* left = lefts + p * LANES;
        for (int i = 0; i < LANES; i++) {
            u32 within = (lanes ? lanes[i] : 0) + (u32)o->imm;
            i64 offset = scalar + within;
            if (indexed) {
                i64 x = index[i], element = within / 4 * 4;
                i64 spread = (x / together * stride + element) * together + x % together * 4 + within % 4;
                offset = scalar + (swizzled ? spread : x * stride + within);
                left[i] = index[i] < records ? 1ll << 32 : 0;
            } else
                left[i] = (i64)records - offset;
            to[i] = base + (u64)offset;
        }
        for (int i = 0; i < LANES; i++) whole |= (u64)(left[i] >= width) << i;
        if (!all_inside(c, to, exec & whole, width, writes)) return NUMPY;
        u64 rest = exec & ~whole;
        EACH(rest, for (u32 k = 0; k < width;
                        k += unit) if (left[i] >= k + unit && !inside(c, to[i] + k, unit, writes)) return NUMPY;)
        if (writes && c->known) {
            u64 known = ALL, some = 0;
            for (u32 k = 0; k < (width + 3) / 4; k++) known &= c->known[(o->dst + k) * c->n + w];
            for (int i = 0; i < LANES; i++) some |= (u64)(left[i] >= unit) << i;
            if (exec & some & ~known) return NUMPY;
        }
        c->enabled[p] = whole;
    }
    return OK;
}
int buffer_load(Core* c, const Op* o) {
    if (buffer_addresses(c, o, 0) != OK) return NUMPY;
    u32 width = o->more & 31, unit = width < 4 ? width : 4;
    WAVES {
        u64 *address = c->addresses + p * LANES, exec = exec_of(c, w), rest = exec & ~c->enabled[p];
        i64* left = (i64*)c->addresses + (c->count + p) * LANES;
        u32 words[LANES][4];
        EACH(rest, for (u32 k = 0; k < 4; k++) words[i][k] = 0;
             for (u32 k = 0; k < width; k += unit) if (left[i] >= k + unit)
                 __builtin_memcpy((u8*)words[i] + k, (u8*)address[i] + k, unit);
             address[i] = (u64)words[i];)
        receive(c, o, w, address, exec);
    }
    return OK;
}
int buffer_store(Core* c, const Op* o) {
    if (buffer_addresses(c, o, 1) != OK) return NUMPY;
    u32 width = o->more & 31, unit = width < 4 ? width : 4;
    WAVES {
        u64 *address = c->addresses + p * LANES, exec = exec_of(c, w), whole = exec & c->enabled[p],
            rest = exec & ~whole;
        i64* left = (i64*)c->addresses + (c->count + p) * LANES;
        if (c->counting && rest) return NUMPY;
        if (c->counting) c->changes[0] += !holds(c, o, w, address, whole, width);
        give(c, o, w, address, whole, width);
        for (u32 k = 0; k < width; k += unit)
            EACH(
                rest, if (left[i] >= k + unit) {
                    u32 word = vector(c, o->dst + k / 4, w)[i] >> (o->more & HIGH_HALF ? 16 : 0);
                    __builtin_memcpy((u8*)address[i] + k, &word, unit);
                })
    }
    if (c->one_value) WAVES {
            const u64* address = c->addresses + p * LANES;
            i64* left = (i64*)c->addresses + (c->count + p) * LANES;
            u64 exec = exec_of(c, w), rest = exec & ~c->enabled[p];
            if (!holds(c, o, w, address, exec & c->enabled[p], width)) return NUMPY;
            for (u32 k = 0; k < width; k += unit)
                EACH(
                    rest, if (left[i] >= k + unit) {
                        u32 word = vector(c, o->dst + k / 4, w)[i] >> (o->more & HIGH_HALF ? 16 : 0);
                        if (__builtin_memcmp((u8*)address[i] + k, &word, unit)) return NUMPY;
                    })
        }
    return OK;
}
