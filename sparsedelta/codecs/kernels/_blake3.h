/* BLAKE3 of many short messages at once (the hash of the digests, FORMAT §1). Each lane of a vector hashes one part of
 * a message: a chunk of up to 1024 bytes, or two nodes of the tree above the chunks. */

enum { LANES = 8, PART = 1024, BLOCK = 64, NODE = 32 };
enum { CHUNK_START = 1, CHUNK_END = 2, PARENT = 4, ROOT = 8 };

typedef uint32_t Lanes __attribute__((vector_size(4 * LANES)));

static const uint32_t START_VALUES[8] = {0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19};

/* The order in which each round uses the words of a block. */
static const u8 WORDS[7][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8},
    {3, 4, 10, 12, 13, 2, 7, 14, 6, 5, 9, 0, 11, 15, 8, 1}, {10, 7, 12, 9, 14, 3, 13, 15, 4, 0, 11, 2, 5, 8, 1, 6},
    {12, 13, 9, 11, 15, 10, 14, 8, 7, 2, 5, 3, 0, 1, 6, 4}, {9, 14, 11, 5, 8, 12, 15, 1, 13, 3, 0, 10, 2, 6, 4, 7},
    {11, 15, 5, 0, 1, 9, 8, 6, 14, 10, 2, 12, 3, 4, 7, 13},
};

/* What one lane hashes. */
typedef struct {
    const u8 *data;
    size n_bytes;
    uint64_t number; /* of the chunk in its message */
    int flags;       /* PARENT, ROOT */
    u8 *node;        /* receives NODE bytes */
} Part;

#define TURN(value, n) ((value) >> (n) | (value) << (32 - (n)))
#define MIX(a, b, c, d, x, y)                                       \
    v[a] += v[b] + (x); v[d] ^= v[a]; v[d] = TURN(v[d], 16);        \
    v[c] += v[d];       v[b] ^= v[c]; v[b] = TURN(v[b], 12);        \
    v[a] += v[b] + (y); v[d] ^= v[a]; v[d] = TURN(v[d], 8);         \
    v[c] += v[d];       v[b] ^= v[c]; v[b] = TURN(v[b], 7);

/* Hashes up to LANES parts. */
CLONED static void hash_parts(const Part *parts, int n_parts) {
    Lanes chain[8], v[16], message[16], low, high, length, flags, active;
    u8 padded[LANES][BLOCK];
    size n_blocks[LANES] = {0}, most = 0;
    for (int i = 0; i < 8; i++) chain[i] = (Lanes){0} + START_VALUES[i];
    for (int lane = 0; lane < LANES; lane++) {
        uint64_t number = lane < n_parts ? parts[lane].number : 0;
        low[lane] = (uint32_t)number;
        high[lane] = (uint32_t)(number >> 32);
        if (lane >= n_parts) continue;
        n_blocks[lane] = parts[lane].n_bytes ? (parts[lane].n_bytes + BLOCK - 1) / BLOCK : 1;
        if (n_blocks[lane] > most) most = n_blocks[lane];
    }
    memset(padded, 0, sizeof padded);
    for (size block = 0; block < most; block++) {
        const u8 *blocks[LANES];
        for (int lane = 0; lane < LANES; lane++) {
            int is_active = block < n_blocks[lane];
            size left = is_active ? parts[lane].n_bytes - block * BLOCK : 0, here = left < BLOCK ? left : BLOCK;
            blocks[lane] = padded[lane];
            if (here == BLOCK)
                blocks[lane] = parts[lane].data + block * BLOCK;
            else if (is_active)
                memcpy(padded[lane], parts[lane].data + block * BLOCK, here);
            int own = is_active ? parts[lane].flags & PARENT : 0, is_last = block == n_blocks[lane] - 1;
            if (is_active && !own) own = (block ? 0 : CHUNK_START) | (is_last ? CHUNK_END : 0);
            flags[lane] = is_active ? (uint32_t)(own | (is_last ? parts[lane].flags & ROOT : 0)) : 0;
            length[lane] = (uint32_t)here;
            active[lane] = is_active ? UINT32_MAX : 0;
        }
        for (int i = 0; i < 16; i++)
            for (int lane = 0; lane < LANES; lane++) message[i][lane] = ((const u32 *)blocks[lane])[i];
        for (int i = 0; i < 8; i++) v[i] = chain[i];
        for (int i = 0; i < 4; i++) v[8 + i] = (Lanes){0} + START_VALUES[i];
        v[12] = low, v[13] = high, v[14] = length, v[15] = flags;
        for (int round = 0; round < 7; round++) {
            const u8 *w = WORDS[round];
            MIX(0, 4, 8, 12, message[w[0]], message[w[1]])
            MIX(1, 5, 9, 13, message[w[2]], message[w[3]])
            MIX(2, 6, 10, 14, message[w[4]], message[w[5]])
            MIX(3, 7, 11, 15, message[w[6]], message[w[7]])
            MIX(0, 5, 10, 15, message[w[8]], message[w[9]])
            MIX(1, 6, 11, 12, message[w[10]], message[w[11]])
            MIX(2, 7, 8, 13, message[w[12]], message[w[13]])
            MIX(3, 4, 9, 14, message[w[14]], message[w[15]])
        }
        for (int i = 0; i < 8; i++) chain[i] = ((v[i] ^ v[i + 8]) & active) | (chain[i] & ~active);
    }
    for (int lane = 0; lane < n_parts; lane++)
        for (int i = 0; i < 8; i++) ((u32 *)parts[lane].node)[i] = chain[i][lane];
}

typedef struct {
    const u8 *data;
    size n_bytes;
    size row; /* of what the message belongs to */
    const u8 *expected;
    int n_expected; /* bytes of the digest that are compared, at most NODE */
} Message;

/* Parts that wait until all lanes are in use. */
typedef struct {
    Part parts[LANES];
    int n;
} Waiting;

static void flush(Waiting *waiting) {
    if (waiting->n) hash_parts(waiting->parts, waiting->n);
    waiting->n = 0;
}

INLINE void add_part(Waiting *waiting, Part part) {
    waiting->parts[waiting->n++] = part;
    if (waiting->n == LANES) flush(waiting);
}

INLINE size n_nodes(size n_bytes) { return n_bytes ? (n_bytes + PART - 1) / PART : 1; }

/* Hashes messages. `nodes` has NODE bytes for each chunk of each message; the digest of a message is written where its
 * first chunk has its node. */
static void hash_messages(const Message *messages, size n, u8 *nodes) {
    Waiting waiting = {.n = 0};
    u8 *node = nodes;
    size most = 1;
    for (size i = 0; i < n; i++) {
        size count = n_nodes(messages[i].n_bytes);
        if (count > most) most = count;
        for (size c = 0; c < count; c++, node += NODE) {
            size left = messages[i].n_bytes - c * PART;
            add_part(&waiting, (Part){messages[i].data + c * PART, left < PART ? left : PART, (uint64_t)c, count == 1 ? ROOT : 0, node});
        }
    }
    flush(&waiting);
    /* Level by level, two nodes become one. A node without a partner moves up. */
    for (size step = 1; step < most; step *= 2) {
        node = nodes;
        for (size i = 0; i < n; node += NODE * n_nodes(messages[i].n_bytes), i++) {
            size count = n_nodes(messages[i].n_bytes), here = (count + step - 1) / step; /* nodes of this level */
            for (size c = 0; c + 1 < here; c += 2) {
                /* Nodes of this level are at the multiples of `step`; a parent replaces its left node. */
                u8 *left = node + c * step * NODE, *right = left + step * NODE;
                if (step > 1) memcpy(left + NODE, right, NODE);
                add_part(&waiting, (Part){left, 2 * NODE, 0, PARENT | (here == 2 ? ROOT : 0), left});
            }
        }
        flush(&waiting);
    }
}
