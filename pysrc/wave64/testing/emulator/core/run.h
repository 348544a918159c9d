// The run of a party: what waits, registers never written and barriers ask of every instruction, around its handler.

// ---- s_waitcnt and what it waits for

int s_waitcnt(Core* c, const Op* o) {
    if (!c->busy) return OK;
    i64 left[2] = {(o->imm & 15) | (o->imm >> 10 & 0x30), o->imm >> 8 & 15};
    WAVES for (int k = 0; k < 2; k++) {
        i64 seen = c->issued[k][w] - left[k], *done = c->done[k] + w;
        if (left[k] && c->unordered[k][w] > *done) seen = 0;
        if (seen > *done) *done = seen;
    }
    return OK;
}
SLOW int under_way(Core* c, u32 reg) {  // whether a wave of the party still waits for the register
    for (int k = 0; k < 2; k++) WAVES if (c->due[k][reg * c->n + w] > c->done[k][w]) return 1;
    for (int k = 0; k < 2; k++)
        for (i64 w = 0; w < c->n; w++)
            if (c->due[k][reg * c->n + w] > c->done[k][w]) return 0;
    c->busy[reg] = 0;
    return 0;
}
static int waited(Core* c, const Op* o) {
    for (int r = 0; r < o->watched; r++)
        for (u32 reg = o->watch[r].first; reg < o->watch[r].first + (u32)o->watch[r].count; reg++)
            if (c->busy[reg] && under_way(c, reg)) return 0;
    return 1;
}
static void issued(Core* c, const Op* o) {
    for (int k = 0; k < 2; k++) {
        if (!(o->counter & (k ? LGKM : VM))) continue;
        WAVES {
            i64 now = ++c->issued[k][w];
            if (o->counter & UNORDERED) c->unordered[k][w] = now;
            for (int r = 0; r < o->writes; r++)
                for (u32 i = 0; i < o->write[r].count; i++) c->due[k][(o->write[r].first + i) * c->n + w] = now;
        }
    }
    for (int r = 0; r < o->writes; r++)
        for (u32 i = 0; i < o->write[r].count; i++) c->busy[o->write[r].first + i] = 1;
}

// ---- what was never written; `fresh` is, by wave, the lanes whose results are known

static u64 known_source(const Core* c, const Source* s, i64 w) {
    return s->kind == VECTOR ? c->known[s->reg * c->n + w]
           : s->kind == ONE  ? c->known[(SCALAR + s->reg) * c->n + w]
                             : ALL;
}
static int all_sure(const Core* c, const Op* o) {
    u8 sure = 1;
    for (int r = 0; r < o->reads; r++)
        for (u32 i = 0; i < o->read[r].count; i++) sure &= c->sure[o->read[r].first + i];
    return sure;
}
static int known(Core* c, const Op* o) {
    if (all_sure(c, o)) {
        WAVES c->fresh[p] = ALL;
        return 1;
    }
    WAVES {
        u64 all = ALL, exec = exec_of(c, w);
        for (int r = 0; r < o->reads; r++)
            for (u32 i = 0; i < o->read[r].count; i++) all &= c->known[(o->read[r].first + i) * c->n + w];
        c->fresh[p] = all;
        switch (o->rule) {
            case BY_ALL:
                if (~all) return 0;
                break;
            case MATTERS:
                if (exec & ~all) return 0;
                break;
            case FROM_MEMORY:
                if (exec & ~all) return 0;
                c->fresh[p] = ALL;
                break;
            case CHOSEN: {  // by a mask that is known as a whole; else both must be
                u64 a = known_source(c, o->src, w), b = known_source(c, o->src + 1, w),
                    m = mask_source((Core*)c, o, 2, w);
                u64 of_mask =
                    c->known[(SCALAR + o->src[2].reg) * c->n + w] & c->known[(SCALAR + o->src[2].reg + 1) * c->n + w];
                c->fresh[p] = of_mask ? (m & b) | (~m & a) : a & b;
            }
        }
    }
    return 1;
}
static void mark(Core* c, const Op* o) {
    for (int r = 0; r < o->writes; r++)
        for (u32 i = 0; i < o->write[r].count; i++) {
            u32 reg = o->write[r].first + i;
            u64 *file = c->known + reg * c->n, all = ALL;
            if (c->sure[reg]) {
                WAVES all &= c->fresh[p];
                if (all == ALL) continue;
            }
            WAVES {
                u64 lanes = lanes_written(c, o, w, p), fresh = c->fresh[p];
                if (reg >= SCALAR)
                    file[w] = (fresh | ~exec_of(c, w)) == ALL ? ALL : 0;
                else
                    file[w] = (file[w] & ~lanes) | (fresh & lanes);
            }
            all = ALL;
            for (i64 w = 0; w < c->n; w++) all &= file[w];
            c->sure[reg] = all == ALL;
        }
}

// ---- barriers, of a party of whole workgroups: all go on

static int barrier(Core* c) {
    i64 waves = c->group_waves;
    if (c->special || (waves > 1 && (c->step != 1 || c->start % waves || c->count % waves))) return NUMPY;
    if (c->stores) {
        i64 kept = 0, end = c->start + c->count;
        for (i64 k = 0; k < c->stored; k++) {
            i64 w = c->stores[k].wave;
            if (w >= c->start && w < end && c->stores[k].count > c->done[1][w]) return NUMPY;
        }
        for (i64 k = 0; k < c->stored; k++)
            if (c->stores[k].wave < c->start || c->stores[k].wave >= end) c->stores[kept++] = c->stores[k];
        c->stored = kept;
    }
    if (c->met_with) WAVES c->met_with[w] = c->done[1][w];
    if (c->first[READ] && waves > 1)
        for (i64 chunk = c->start / waves * c->lds_stride >> 8;
             chunk <= ((c->start + c->count) / waves * c->lds_stride - 1) >> 8; chunk++) {
            if (!c->dirty[chunk]) continue;
            i64 low = chunk << 8, high = low + 256, from = c->start / waves * c->lds_stride;
            i64 to = (c->start + c->count) / waves * c->lds_stride;
            if (low >= from && high <= to) c->dirty[chunk] = 0;  // else it holds another workgroup's bytes, too
            low = low < from ? from : low, high = high > to ? to : high;
            for (int kind = 0; kind < 3; kind++) {
                __builtin_memset(c->first[kind] + low, 0, (size_t)(high - low));
                __builtin_memset(c->last[kind] + low, 0, (size_t)(high - low));
            }
        }
    return OK;
}

// ---- from `pc` until the waves part, end, wait or come to `limit`; gives how many steps of `patience` are left, and
// in `outcome` why it ended: NUMPY where that path must execute the instruction at c->pc, OK at the limit

i64 run(Core* c, i64 limit, i64 patience, i64* outcome) {
    i64 pc = c->pc;
    for (i64 left = patience; left > 0;) {
        if (pc < 0 || pc >= c->length || !(c->reached[pc] & 1)) return c->pc = pc, *outcome = NUMPY, left;
        const Op* o = c->ops + pc;
        c->pc = pc;
        if (!o->run || (c->busy && !waited(c, o)) || (c->known && o->rule != UNSEEN && !known(c, o)))
            return *outcome = NUMPY, left;
        int got = o->run(c, o);
        if (got == NUMPY || (got == BARRIER && barrier(c) != OK)) return *outcome = NUMPY, left;
        if (c->known && o->rule != OWN && o->writes) mark(c, o);
        if (o->counter && c->busy) issued(c, o);
        c->counts[pc] += c->count;
        left--;
        if (got == END || got == PART) return *outcome = got, left;
        pc = got == JUMP ? pc + o->jump : pc + o->words;
        if (pc >= limit) return c->pc = pc, *outcome = OK, left;
    }
    c->pc = pc;
    *outcome = OK;
    return 0;
}
