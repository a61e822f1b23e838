/* Many small tensors in one call: decode, rebuild and check each of them, as `tensors.rebuild` does for one. A row for which
 * anything is wrong is only marked, and the caller does it again with the code that says what is wrong. */

/* The columns that describe a tensor; -1 where there is nothing. Offsets are in bytes. */
enum {
    BASE_AT,        /* in `base`; -1: the tensor starts with zeros */
    OUT_AT,         /* in `out`; -1: only decode */
    N_BYTES,
    WIDTH,
    BASE_DIGEST,    /* in `digests`: what to compare the base tensor with */
    TARGET_DIGEST,
    CODED_AT,       /* in `payload`: the streams of its chunk; -1: it has none */
    START,
    SPAN,
    NNZ,
    KIND,           /* of values */
    INDEX,
    PACKING,
    FIRST_STORED,   /* in `stored` */
    CODED_DIGEST,
    TOUCHED_DIGEST, /* of the elements before, then after */
    N_COLUMNS
};
enum { GAPS, BITMAP, RICE, N_INDICES };
enum { PLANES, STEPS, N_PACKINGS };
enum { DIGEST_BYTES = 16, TOUCHED_BYTES = 8, MOST_NUMBER_BYTES = 5, MOST_SMALL_BYTES = 1 << 20 };

/* A stream that is read from the beginning. */
typedef struct {
    const u8 *at, *end;
} Reader;

static int read_number(Reader *reader, uint64_t *number) {
    *number = 0;
    for (int i = 0; i < MOST_NUMBER_BYTES && reader->at < reader->end; i++) {
        u8 byte = *reader->at++;
        *number |= (uint64_t)(byte & 127) << 7 * i;
        if (byte < 128) return !(*number >> 32);
    }
    return 0;
}

typedef struct {
    int64_t n, k; /* as `read_rice` takes them */
    int of_rest;
} Subset;

static int read_subset(Reader *reader, Subset *subset) {
    uint64_t doubled, k = 0;
    if (!read_number(reader, &doubled) || (doubled > 1 && !read_number(reader, &k)) || k > 31) return 0;
    subset->n = (int64_t)(doubled >> 1), subset->k = (int64_t)k, subset->of_rest = doubled & 1;
    return 1;
}

/* Replaces gaps by the numbers that they lead to; returns whether all are below `bound`. */
static int sum_gaps(u32 *gaps, size n, size bound) {
    uint64_t next = 0;
    for (size i = 0; i < n; i++) {
        next += gaps[i];
        gaps[i] = (uint32_t)next++;
    }
    return next <= (uint64_t)bound;
}

/* Reads exactly nnz positions. `room` holds 2 · span numbers: the positions, and other numbers. */
static int read_positions(int index, const u8 *data, size n_bytes, size nnz, size span, u32 *room) {
    if (index == GAPS) {
        size found = 0;
        int64_t at = 0;
        for (size i = 0; i < n_bytes; i++) {
            at += data[i];
            if (data[i] == SKIP) continue;
            if (found >= nnz) return 0;
            room[found++] = (uint32_t)at++;
        }
        return found == nnz && n_bytes && data[n_bytes - 1] != SKIP && at <= span;
    }
    if (index == BITMAP) {
        if (n_bytes != (span + 7) / 8 || !is_padded(data, span, 1)) return 0;
        Unary unary = {data, n_bytes, 0, 0, 0, -1};
        size found = 0;
        for (; next_count(&unary) >= 0; found++)
            if (found < nnz) room[found] = (uint32_t)unary.last;
        return found == nnz;
    }
    Reader reader = {data, data + n_bytes};
    Subset subset;
    if (!n_bytes || *reader.at++ || !read_subset(&reader, &subset)) return 0;
    if (subset.n > span || (subset.of_rest ? span - subset.n : subset.n) != nnz) return 0;
    size n_low = (subset.n * subset.k + 7) / 8;
    u32 *listed = subset.of_rest ? room + span : room;
    if (n_low > reader.end - reader.at) return 0;
    i64 lengths[2] = {subset.n, subset.k};
    if (read_rice(reader.at, reader.end - reader.at, lengths, 1, n_low, listed) != GOOD) return 0;
    if (!sum_gaps(listed, subset.n, span)) return 0;
    for (size number = 0, i = 0, found = 0; subset.of_rest && number < span; number++) {
        if (i < subset.n && listed[i] == number) i++;
        else room[found++] = (uint32_t)number;
    }
    return 1;
}

/* Reads nnz codes of the packing `planes`; a plane of zeros has no bytes. */
INLINE int read_planes(const u8 *data, const i64 *stored, size nnz, void *codes, int W) {
    for (int j = 0; j < W; j++)
        if (stored[j] && stored[j] != nnz) return 0;
    for (size i = 0; i < nnz; i++) {
        uint64_t code = 0;
        const u8 *plane = data;
        for (int j = 0; j < W; j++)
            if (stored[j]) code |= (uint64_t)plane[i] << 8 * j, plane += nnz;
        put(codes, i, code, W);
    }
    return 1;
}

/* Reads nnz codes of the packing `steps`, without classes. `room` holds 2 · nnz numbers. */
INLINE int read_steps(const u8 *data, size n_bytes, size nnz, void *codes, u32 *room, int W) {
    Reader reader = {data, data + n_bytes};
    Subset subset;
    uint64_t k, most = W < 4 ? ((uint64_t)1 << 8 * W) - 1 : UINT32_MAX;
    if (!n_bytes || *reader.at++ || !read_subset(&reader, &subset) || !read_number(&reader, &k) || k > 31) return 0;
    int64_t n_long = subset.of_rest ? nnz - subset.n : subset.n;
    size n_sign_bytes = (nnz + 7) / 8;
    const u8 *signs = reader.at;
    if (subset.n > nnz || n_sign_bytes > reader.end - reader.at || !is_padded(signs, nnz, 1)) return 0;
    reader.at += n_sign_bytes;
    i64 lengths[4] = {subset.n, subset.k, n_long, (int64_t)k};
    size n_low = (subset.n * subset.k + 7) / 8 + (n_long * (size)k + 7) / 8;
    if (n_low > reader.end - reader.at) return 0;
    if (read_rice(reader.at, reader.end - reader.at, lengths, 2, n_low, room) != GOOD || !sum_gaps(room, subset.n, nnz)) return 0;
    const u32 *listed = room, *excess = room + subset.n;
    for (size i = 0, next = 0; i < nnz; i++) {
        int is_listed = next < subset.n && listed[next] == i;
        uint64_t code = 1 + (uint64_t)(signs[i >> 3] >> (i & 7) & 1);
        next += is_listed;
        if (is_listed != subset.of_rest) code += 2 * ((uint64_t)*excess++ + 1);
        if (code > most) return 0;
        put(codes, i, code, W);
    }
    return 1;
}

typedef struct {
    const Py_buffer *base, *payload, *digests, *stored;
    Py_buffer *out;
    u32 *room;          /* numbers: twice as many as the longest span */
    u8 *codes;          /* of one tensor */
    u8 *touched;        /* the touched elements of all tensors, before and after */
    Message *messages;
    size n_messages, n_parts;
} Small;

INLINE int within(int64_t at, int64_t n_bytes, const Py_buffer *array) {
    return at >= 0 && n_bytes >= 0 && at <= array->len && n_bytes <= array->len - at;
}

static int expect(Small *small, size row, const void *data, size n_bytes, int64_t at, int n_expected) {
    if (!within(at, n_expected, small->digests)) return 0;
    small->messages[small->n_messages++] = (Message){data, n_bytes, row, (const u8 *)small->digests->buf + at, n_expected};
    small->n_parts += n_nodes(n_bytes);
    return 1;
}

/* Returns the number of streams of a tensor's chunk, and their bytes; 0 if the columns are not valid. */
static int streams_of(const i64 *row, const Py_buffer *stored, int64_t *n_bytes) {
    int n = row[PACKING] == PLANES ? 1 + (int)row[WIDTH] : 2;
    const i64 *sizes = stored->buf;
    if (row[FIRST_STORED] < 0 || row[FIRST_STORED] > n_items(stored) - n) return 0;
    *n_bytes = 0;
    for (int i = 0; i < n; i++) {
        int64_t one = sizes[row[FIRST_STORED] + i];
        if (one < 0 || one > INT32_MAX) return 0;
        *n_bytes += one;
    }
    return n;
}

static int is_valid(const i64 *row, const Small *small) {
    int64_t width = row[WIDTH], n_bytes = row[N_BYTES];
    if (!IS_WIDTH(width) || n_bytes < 0 || n_bytes > MOST_SMALL_BYTES || n_bytes % width) return 0;
    if (row[CODED_AT] < -1 || row[BASE_DIGEST] < -1 || row[TARGET_DIGEST] < -1 || row[TOUCHED_DIGEST] < -1) return 0;
    if (row[BASE_AT] != -1 && !within(row[BASE_AT], n_bytes, small->base)) return 0;
    if (row[OUT_AT] != -1 && !within(row[OUT_AT], n_bytes, small->out)) return 0;
    if (row[CODED_AT] == -1) return 1;
    if (row[SPAN] < 1 || row[SPAN] > n_bytes / width || row[START] < 0 || row[START] > n_bytes / width - row[SPAN]) return 0;
    if (row[NNZ] < 1 || row[NNZ] > row[SPAN] || row[KIND] < 0 || row[KIND] >= N_KINDS) return 0;
    return row[INDEX] >= 0 && row[INDEX] < N_INDICES && row[PACKING] >= 0 && row[PACKING] < N_PACKINGS;
}

/* Rebuilds one tensor, and lists the messages whose digests are to be compared. */
static int rebuild_one(Small *small, const i64 *row, size number) {
    int width = (int)row[WIDTH];
    u8 *out = row[OUT_AT] < 0 ? NULL : (u8 *)small->out->buf + row[OUT_AT];
    const u8 *base = row[BASE_AT] < 0 ? NULL : (const u8 *)small->base->buf + row[BASE_AT];
    if (out && base) memcpy(out, base, row[N_BYTES]);
    if (out && !base) memset(out, 0, row[N_BYTES]);
    if (base && row[BASE_DIGEST] >= 0 && !expect(small, number, base, row[N_BYTES], row[BASE_DIGEST], DIGEST_BYTES)) return 0;
    if (row[CODED_AT] >= 0) {
        int64_t coded_bytes;
        if (!streams_of(row, small->stored, &coded_bytes) || !within(row[CODED_AT], coded_bytes, small->payload)) return 0;
        const u8 *coded = (const u8 *)small->payload->buf + row[CODED_AT];
        const i64 *stored = (const i64 *)small->stored->buf + row[FIRST_STORED];
        size nnz = row[NNZ], n_index = stored[0];
        if (!expect(small, number, coded, coded_bytes, row[CODED_DIGEST], DIGEST_BYTES)) return 0;
        u32 *positions = small->room, *other = small->room + row[SPAN];
        int good = 0;
        if (!read_positions((int)row[INDEX], coded, n_index, nnz, row[SPAN], positions)) return 0;
        if (row[PACKING] == PLANES) { FOR_WIDTH(width, good = read_planes(coded + n_index, stored + 1, nnz, small->codes, W)) }
        else { FOR_WIDTH(width, good = read_steps(coded + n_index, stored[1], nnz, small->codes, other, W)) }
        if (!good) return 0;
        if (out) {
            void *before = small->touched, *after = small->touched + nnz * width;
            void *block = out + row[START] * width;
            FOR_WIDTH(width, good = change_in(block, row[SPAN], 0, positions, nnz, small->codes, (int)row[KIND], before, after, W))
            if (!good) return 0;
            small->touched += 2 * nnz * width;
            int64_t at = row[TOUCHED_DIGEST];
            if (at >= 0 && !(expect(small, number, before, nnz * width, at, TOUCHED_BYTES) &&
                             expect(small, number, after, nnz * width, at + TOUCHED_BYTES, TOUCHED_BYTES)))
                return 0;
        }
    }
    return !out || row[TARGET_DIGEST] < 0 || expect(small, number, out, row[N_BYTES], row[TARGET_DIGEST], DIGEST_BYTES);
}

static void *allocate(size n_bytes) { return malloc(n_bytes > 0 ? (size_t)n_bytes : 1); }

/* Compares the digests of all messages that were listed. Returns 0 if there is not enough memory. */
static int compare_digests(const Small *small, u8 *good) {
    u8 *nodes = allocate(NODE * small->n_parts), *node = nodes;
    if (!nodes) return 0;
    hash_messages(small->messages, small->n_messages, nodes);
    for (size i = 0; i < small->n_messages; i++) {
        const Message *one = &small->messages[i];
        if (memcmp(node, one->expected, one->n_expected)) good[one->row] = 0;
        node += NODE * n_nodes(one->n_bytes);
    }
    free(nodes);
    return 1;
}

/* Rebuilds the tensors that `table` describes. Sets `good` for each that is rebuilt and has the right digests. */
static PyObject *rebuild_small(PyObject *module, PyObject *args) {
    Py_buffer b[7];
    if (!PyArg_ParseTuple(args, "O&O&O&O&O&O&O&", in_u8, &b[0], in_u8, &b[1], in_u8, &b[2], in_i64, &b[3], in_i64, &b[4], out_u8, &b[5], out_u8, &b[6]))
        return NULL;
    Small small = {.base = &b[0], .payload = &b[1], .digests = &b[2], .stored = &b[3], .out = &b[5]};
    const i64 *table = b[4].buf;
    u8 *good = b[6].buf;
    size n = b[6].len, longest = 0, most_codes = 0, n_touched = 0;
    if (n_items(&b[4]) != n * N_COLUMNS) return release(b, 7, wrong_sizes());
    for (size i = 0; i < n; i++) {
        const i64 *row = table + i * N_COLUMNS;
        good[i] = is_valid(row, &small);
        if (!good[i] || row[CODED_AT] < 0) continue;
        if (row[SPAN] > longest) longest = row[SPAN];
        if (row[NNZ] > most_codes) most_codes = row[NNZ];
        n_touched += 2 * row[NNZ] * row[WIDTH];
    }
    u32 *room = allocate(8 * (longest + 2 * most_codes));
    u8 *codes = allocate(8 * most_codes), *touched = allocate(n_touched);
    Message *messages = allocate(5 * n * (size)sizeof(Message));
    int has_memory = room && codes && touched && messages;
    if (has_memory) {
        small.room = room, small.codes = codes, small.touched = touched, small.messages = messages;
        Py_BEGIN_ALLOW_THREADS
        for (size i = 0; i < n; i++)
            if (good[i]) good[i] = (u8)rebuild_one(&small, table + i * N_COLUMNS, i);
        has_memory = compare_digests(&small, good);
        Py_END_ALLOW_THREADS
    }
    free(room), free(codes), free(touched), free(messages);
    return release(b, 7, has_memory ? none() : PyErr_NoMemory());
}

/* Writes the first bytes of the digest of each part of `data`; `ends` holds where the parts end. */
static PyObject *digests_of(PyObject *module, PyObject *args) {
    Py_buffer b[3];
    size n_digest;
    if (!PyArg_ParseTuple(args, "O&O&nO&", in_u8, &b[0], in_i64, &b[1], &n_digest, out_u8, &b[2])) return NULL;
    const i64 *ends = b[1].buf;
    size n = n_items(&b[1]), at = 0, n_parts = 0;
    int fits = n_digest >= 1 && n_digest <= NODE && b[2].len == n * n_digest;
    for (size i = 0; fits && i < n; i++) {
        fits = ends[i] >= at && ends[i] <= b[0].len;
        if (fits) n_parts += n_nodes(ends[i] - at), at = ends[i];
    }
    if (!fits) return release(b, 3, wrong_sizes());
    Message *messages = allocate(n * (size)sizeof(Message));
    u8 *nodes = allocate(NODE * n_parts), *node = nodes, *out = b[2].buf;
    int has_memory = messages && nodes;
    if (has_memory) {
        Py_BEGIN_ALLOW_THREADS
        at = 0;
        for (size i = 0; i < n; at = ends[i++]) messages[i] = (Message){(const u8 *)b[0].buf + at, ends[i] - at, i, NULL, 0};
        hash_messages(messages, n, nodes);
        for (size i = 0; i < n; node += NODE * n_nodes(messages[i++].n_bytes)) memcpy(out + i * n_digest, node, n_digest);
        Py_END_ALLOW_THREADS
    }
    free(messages), free(nodes);
    return release(b, 3, has_memory ? none() : PyErr_NoMemory());
}

/* ---- Compare many small tensors ---- */

/* Columns that describe two tensors of the same dtype and shape, and what was found. */
enum { PAIR_BASE, PAIR_TARGET, PAIR_BYTES, PAIR_WIDTH, PAIR_KIND, N_GIVEN };
/* FOUND_NNZ: -1 if the caller has to compare the pair. FOUND_PLANES: one bit for each plane that is stored. */
enum { FOUND_NNZ, FOUND_INDEX, FOUND_INDEX_BYTES, FOUND_CODED_BYTES, FOUND_PACKING, FOUND_PLANES, N_FOUND };
enum { LEVEL_FAST, LEVEL_DEFAULT, LEVEL_MAX };
/* Up to FEWEST changes are coded as at the fast level, as in `encode_chunk`. */
enum { FEWEST = 8, FEW = 32, PAIR_DIGESTS = 3 * DIGEST_BYTES + 2 * TOUCHED_BYTES };
/* Longer streams are left to the caller, because zstd may make them smaller. Room for a stream has some bytes more. */
enum { SHORT = 63, STREAM_ROOM = SHORT + HEAD_BYTES, STEPS_ROOM = 128, MOST_STREAMS = SHORT + 8 * FEWEST };
enum { LEAST_FRAME = 9 }; /* every zstd frame with content is larger */

/* Returns whether zstd may make a short stream smaller, as `compress_stream` uses it at the levels fast and default. Literals of up
 * to 63 bytes are never compressed. A frame with matches takes at least 15 bytes more than the literals: 9 of heads, 1 for literals, 5
 * for sequences. So it can be smaller only if matches cover 16 bytes. Matches have 4 bytes or more. */
static int may_shrink(const u8 *data, size n) {
    size n_covered = 0, end = 0; /* end of the covered bytes */
    for (size i = 1; i + 4 <= n; i++) {
        int found = 0;
        for (size j = 0; j < i && !found; j++) found = *(const u32 *)(data + i) == *(const u32 *)(data + j);
        if (!found) continue;
        n_covered += i + 4 - (end > i ? end : i);
        end = i + 4;
    }
    return n_covered >= 16;
}

/* The positions of a few changes in the smallest encoding, as `encode_chunk` chooses it. Returns the number of bytes; 0 if the
 * caller has to choose. */
static size encode_few(const u32 *positions, size nnz, size span, int is_quick, int64_t *index, u8 *out) {
    size best = SHORT + 1;
    int is_known = 1;
    if (nnz * 2000 >= span) {
        u8 tokens[SHORT];
        uint32_t next = 0;
        size n = 0;
        for (size i = 0; i < nnz && n <= SHORT; i++) {
            uint32_t gap = positions[i] - next;
            next = positions[i] + 1;
            for (; gap >= SKIP && n <= SHORT; gap -= SKIP, n++)
                if (n < SHORT) tokens[n] = SKIP;
            if (n < SHORT) tokens[n] = (u8)gap;
            n++;
        }
        if (n > SHORT || may_shrink(tokens, n)) is_known = 0;
        else best = n, *index = GAPS, memcpy(out, tokens, n);
    }
    if (nnz * 16 >= span) {
        size n = (span + 7) / 8;
        u8 bits[FEW * 2] = {0}; /* span ≤ 16 * FEW */
        for (size i = 0; i < nnz; i++) bits[positions[i] >> 3] |= (u8)(1 << (positions[i] & 7));
        if (n > SHORT || may_shrink(bits, n)) is_known = 0;
        else if (n < best) best = n, *index = BITMAP, memcpy(out, bits, n);
    }
    if (nnz == span) {
        if (2 < best) best = 2, *index = RICE, out[0] = 0, out[1] = 1; /* no thresholds; all but no items */
    } else if (!is_quick || nnz * 100 <= span) {
        u8 stream[STREAM_ROOM];
        if (2 * nnz > span) return 0; /* the stream would list the other elements */
        size n = write_rice(positions, nnz, stream, sizeof stream);
        if (!n || n > SHORT || may_shrink(stream, n)) is_known = 0;
        else if (n < best) best = n, *index = RICE, memcpy(out, stream, n);
    }
    return is_known ? best : best <= LEAST_FRAME ? best : 0;
}

/* Returns the parameter that codes numbers in the fewest bits, as `best_low_bits` does. */
static int best_low_bits(const u32 *number, size n) {
    uint64_t sum = 0, least = UINT64_MAX;
    int guess = 0, best = 0;
    for (size i = 0; i < n; i++) sum += number[i];
    int64_t part = n ? (int64_t)((double)sum / (double)n * 0.7) : 0;
    while (part >> 1) part >>= 1, guess++;
    for (int k = guess ? guess - 1 : 0; n && k <= guess + 1 && k <= 31; k++) {
        uint64_t bits = (uint64_t)n * k;
        for (size i = 0; i < n; i++) bits += number[i] >> k;
        if (bits < least) least = bits, best = k;
    }
    return best;
}

/* Writes numbers without their low k bits in unary from bit number `at`; the bits must be zero. Returns the number of the next bit. */
static size put_rests(const u32 *number, size n, int k, u8 *out, size at) {
    for (size i = 0; i < n; i++, at++) {
        at += number[i] >> k;
        out[at >> 3] |= (u8)(1 << (at & 7));
    }
    return at;
}

/* Writes up to FEW codes, which are below 256 and not 0, in the packing `steps` without classes. Returns the number of bytes. Each
 * number is below 128, so a stream has at most 8 bytes of heads and signs, 48 of low bits and, with the best parameters, 54 of rests. */
static size encode_steps(const u8 *codes, size nnz, u8 *out) {
    u8 *start = out, steps[FEW];
    u32 gaps[FEW], excess[FEW];
    size n_long = 0, n_gaps = 0, last = -1;
    for (size i = 0; i < nnz; i++) {
        steps[i] = (u8)(codes[i] - 1);
        if (steps[i] >> 1) excess[n_long++] = (uint32_t)(steps[i] >> 1) - 1;
    }
    int of_rest = 2 * n_long > nnz;
    for (size i = 0; i < nnz; i++)
        if ((steps[i] >> 1 == 0) == of_rest) gaps[n_gaps++] = (uint32_t)(i - last - 1), last = i;
    int k_gaps = best_low_bits(gaps, n_gaps), k = best_low_bits(excess, n_long);
    *out++ = 0;
    *out++ = (u8)(2 * n_gaps + of_rest);
    if (n_gaps) *out++ = (u8)k_gaps;
    *out++ = (u8)k;
    pack_numbers(steps, nnz, 1, out, 1);
    out += (nnz + 7) / 8;
    if (k_gaps) pack_numbers(gaps, n_gaps, k_gaps, out, 4);
    out += (n_gaps * k_gaps + 7) / 8;
    if (k) pack_numbers(excess, n_long, k, out, 4);
    out += (n_long * k + 7) / 8;
    size n_rests = 0;
    u8 *rests = out;
    for (size i = 0; i < n_gaps; i++) n_rests += (gaps[i] >> k_gaps) + 1;
    for (size i = 0; i < n_long; i++) n_rests += (excess[i] >> k) + 1;
    memset(rests, 0, (n_rests + 7) / 8);
    put_rests(excess, n_long, k, rests, put_rests(gaps, n_gaps, k_gaps, rests, 0));
    return rests + (n_rests + 7) / 8 - start;
}

typedef struct {
    u32 *positions;
    u8 *before, *after; /* of one tensor */
    u8 *touched;        /* of all tensors */
    u8 *streams;
    Message *messages;
    size n_messages, n_parts;
} Pairs;

static void digest(Pairs *pairs, const void *data, size n_bytes, size row) {
    pairs->messages[pairs->n_messages++] = (Message){data, n_bytes, row, NULL, 0};
    pairs->n_parts += n_nodes(n_bytes);
}

/* Writes the codes of a few changes in the smallest packing, as `encode_chunk` chooses it. Returns the number of bytes; -1 if that is
 * not known without zstd. */
static size pack_few(const u8 *codes, size nnz, int width, int is_quick, i64 *found, u8 *out) {
    u8 used[8] = {0}, steps[STEPS_ROOM], *start = out;
    for (size i = 0; i < nnz * width; i++) used[i % width] |= codes[i];
    for (int j = 0; j < width; j++) {
        if (!used[j]) continue;
        if (j && nnz > FEWEST) return -1;
        found[FOUND_PLANES] |= 1 << j;
        for (size i = 0; i < nnz; i++) *out++ = codes[i * width + j];
    }
    size best = out - start, n_zero = 0, n_high = 0, n_long = 0;
    if (nnz > FEWEST && may_shrink(start, best)) return -1;
    if (is_quick || !best) return best;
    for (size i = 0; i < nnz; i++) n_zero += start[i] == 0, n_high += start[i] > 2, n_long += start[i] > 16;
    if (nnz > 16 && 2 * n_high >= nnz) return -1; /* `scaled` may be smaller, if its symbols repeat */
    if (n_zero || 2 * n_long > nnz) return best;
    size n = encode_steps(start, nnz, steps);
    if (n > SHORT || may_shrink(steps, n)) return -1;
    if (n >= best) return best;
    found[FOUND_PACKING] = STEPS, found[FOUND_PLANES] = 0;
    memcpy(start, steps, n);
    return n;
}

static void compare_one(Pairs *pairs, const u8 *base, const u8 *target, const i64 *given, i64 *found, size row, int level) {
    size n_bytes = given[PAIR_BYTES];
    int width = (int)given[PAIR_WIDTH];
    for (int i = 0; i < N_FOUND; i++) found[i] = 0;
    size nnz = compare_any(base, target, width, n_bytes / width, 0, pairs->positions, pairs->before, pairs->after);
    found[FOUND_NNZ] = nnz <= (level == LEVEL_MAX ? FEWEST : FEW) ? nnz : -1;
    if (found[FOUND_NNZ] < 0) return;
    if (nnz) {
        u8 codes[8 * FEW], streams[MOST_STREAMS];
        int is_quick = nnz <= FEWEST || level == LEVEL_FAST;
        size n = encode_few(pairs->positions, nnz, n_bytes / width, is_quick, (int64_t *)&found[FOUND_INDEX], streams);
        size n_packed = -1;
        if (n) {
            code_any(pairs->before, pairs->after, (int)given[PAIR_KIND], width, nnz, codes);
            n_packed = pack_few(codes, nnz, width, is_quick, found, streams + n);
        }
        if (n_packed < 0) {
            found[FOUND_NNZ] = -1;
            return;
        }
        memcpy(pairs->streams, streams, n + n_packed);
        found[FOUND_INDEX_BYTES] = n;
        found[FOUND_CODED_BYTES] = n + n_packed;
        memcpy(pairs->touched, pairs->before, nnz * width);
        memcpy(pairs->touched + nnz * width, pairs->after, nnz * width);
    }
    digest(pairs, base, n_bytes, row);
    if (!nnz) return;
    digest(pairs, target, n_bytes, row);
    digest(pairs, pairs->streams, found[FOUND_CODED_BYTES], row);
    digest(pairs, pairs->touched, nnz * width, row);
    digest(pairs, pairs->touched + nnz * width, nnz * width, row);
    pairs->streams += found[FOUND_CODED_BYTES];
    pairs->touched += 2 * nnz * width;
}

/* Compares pairs of tensors, and encodes the changes of those with few changes. Writes what was found for each; the digests of base,
 * target, streams and touched elements; and the streams of all, end to end. Returns the size of all streams. */
static PyObject *compare_small(PyObject *module, PyObject *args) {
    Py_buffer b[6];
    int level;
    if (!PyArg_ParseTuple(args, "O&O&O&O&O&O&i", in_u8, &b[0], in_u8, &b[1], in_i64, &b[2], out_i64, &b[3], out_u8, &b[4], out_u8, &b[5], &level))
        return NULL;
    size n = n_items(&b[2]) / N_GIVEN, longest = 0, n_touched = 0;
    const i64 *given = b[2].buf;
    i64 *found = b[3].buf;
    int fits = level >= LEVEL_FAST && level <= LEVEL_MAX && n_items(&b[2]) == n * N_GIVEN && n_items(&b[3]) == n * N_FOUND && b[4].len == n * PAIR_DIGESTS && b[5].len == n * MOST_STREAMS;
    for (size i = 0; fits && i < n; i++) {
        const i64 *one = given + i * N_GIVEN;
        fits = IS_WIDTH(one[PAIR_WIDTH]) && one[PAIR_BYTES] >= one[PAIR_WIDTH] && one[PAIR_BYTES] % one[PAIR_WIDTH] == 0 &&
               one[PAIR_BYTES] <= INT32_MAX && within(one[PAIR_BASE], one[PAIR_BYTES], &b[0]) &&
               within(one[PAIR_TARGET], one[PAIR_BYTES], &b[1]) && one[PAIR_KIND] >= 0 && one[PAIR_KIND] < N_KINDS;
        if (fits && one[PAIR_BYTES] > longest) longest = one[PAIR_BYTES];
        if (fits) n_touched += 2 * (one[PAIR_BYTES] < 8 * FEW ? one[PAIR_BYTES] : 8 * FEW);
    }
    if (!fits) return release(b, 6, wrong_sizes());
    u32 *positions = allocate(4 * longest);
    u8 *values = allocate(2 * longest), *touched = allocate(n_touched), *nodes = NULL;
    Message *messages = allocate(5 * n * (size)sizeof(Message));
    int has_memory = positions && values && touched && messages;
    size n_streams = 0;
    if (has_memory) {
        Pairs pairs = {positions, values, values + longest, touched, b[5].buf, messages, 0, 0};
        Py_BEGIN_ALLOW_THREADS
        for (size i = 0; i < n; i++) {
            const i64 *one = given + i * N_GIVEN;
            compare_one(&pairs, (const u8 *)b[0].buf + one[PAIR_BASE], (const u8 *)b[1].buf + one[PAIR_TARGET], one, found + i * N_FOUND, i, level);
        }
        n_streams = pairs.streams - (u8 *)b[5].buf;
        nodes = allocate(NODE * pairs.n_parts);
        has_memory = nodes != NULL;
        if (has_memory) {
            hash_messages(messages, pairs.n_messages, nodes);
            const u8 *node = nodes;
            for (size i = 0, kind = 0; i < pairs.n_messages; node += NODE * n_nodes(messages[i++].n_bytes)) {
                static const u8 at[5] = {0, DIGEST_BYTES, 2 * DIGEST_BYTES, 3 * DIGEST_BYTES, 3 * DIGEST_BYTES + TOUCHED_BYTES};
                kind = i && messages[i].row == messages[i - 1].row ? kind + 1 : 0;
                memcpy((u8 *)b[4].buf + messages[i].row * PAIR_DIGESTS + at[kind], node, kind < 3 ? DIGEST_BYTES : TOUCHED_BYTES);
            }
        }
        Py_END_ALLOW_THREADS
    }
    free(positions), free(values), free(touched), free(messages), free(nodes);
    return release(b, 6, has_memory ? PyLong_FromSsize_t(n_streams) : PyErr_NoMemory());
}
