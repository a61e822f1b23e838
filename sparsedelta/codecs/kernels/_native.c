/* The inner loops of the codecs (FORMAT §6, §7), compiled. The numpy code beside each caller is the
 * reference: both make the same bytes and refuse the same streams.
 *
 * Arrays come as contiguous buffers, little-endian. Every size that a caller states and every number that a
 * file holds is checked before it is used as a place; a stream that is wrong raises Corrupt. The loops run
 * without the interpreter's lock. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#if !defined(__GNUC__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "written for gcc and clang on little-endian machines; elsewhere numpy does the work"
#endif

/* Also built for processors with AVX2 and a population count, chosen when the module is loaded. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && !defined(NO_CLONES)
#define CLONED __attribute__((target_clones("avx2", "default")))
#else
#define CLONED
#endif
static int has_deposit; /* whether the processor has PDEP, and is quick at it */

#define INLINE static inline __attribute__((always_inline))

typedef Py_ssize_t size;
typedef uint8_t u8;
/* Of any alignment. */
typedef uint16_t __attribute__((aligned(1), may_alias)) u16;
typedef uint32_t __attribute__((aligned(1), may_alias)) u32;
typedef uint64_t __attribute__((aligned(1), may_alias)) u64;
typedef int64_t __attribute__((aligned(1), may_alias)) i64;

static PyObject *Corrupt;

enum { MAX_CLASSES = 16, GROUP = 64, SKIP = 255 };

/* ---- What all kernels share ---- */

/* Runs `call`, in which W is the width of an element as a constant. */
#define FOR_WIDTH(width, call)                            \
    switch (width) {                                      \
        case 1: { enum { W = 1 }; call; break; }          \
        case 2: { enum { W = 2 }; call; break; }          \
        case 4: { enum { W = 4 }; call; break; }          \
        case 8: { enum { W = 8 }; call; break; }          \
    }
#define IS_WIDTH(width) ((width) == 1 || (width) == 2 || (width) == 4 || (width) == 8)

INLINE uint64_t get(const void *array, size i, int width) {
    switch (width) {
        case 1: return ((const u8 *)array)[i];
        case 2: return ((const u16 *)array)[i];
        case 4: return ((const u32 *)array)[i];
        default: return ((const u64 *)array)[i];
    }
}

INLINE void put(void *array, size i, uint64_t value, int width) {
    switch (width) {
        case 1: ((u8 *)array)[i] = (u8)value; break;
        case 2: ((u16 *)array)[i] = (uint16_t)value; break;
        case 4: ((u32 *)array)[i] = (uint32_t)value; break;
        default: ((u64 *)array)[i] = value;
    }
}

static PyObject *release(Py_buffer *buffers, int n, PyObject *result) {
    for (int i = 0; i < n; i++) PyBuffer_Release(&buffers[i]);
    return result;
}

static PyObject *wrong_sizes(void) {
    PyErr_SetString(PyExc_ValueError, "sizes of arrays do not fit each other");
    return NULL;
}

static PyObject *none(void) {
    Py_INCREF(Py_None);
    return Py_None;
}

/* Returns the first bits of 64 flags, which are 0 or 255. */
INLINE uint64_t bits_of(const u8 *flags) {
    uint64_t bits = 0;
#ifdef __SSE2__
    for (int i = 0; i < 4; i++)
        bits |= (uint64_t)(uint32_t)_mm_movemask_epi8(_mm_loadu_si128((const __m128i *)flags + i)) << 16 * i;
#else
    for (int i = 0; i < 8; i++) {
        uint64_t eight = ((const u64 *)flags)[i] & 0x0101010101010101u;
        bits |= (eight * 0x0102040810204080u >> 56) << 8 * i;
    }
#endif
    return bits;
}

/* ---- Packed numbers and Rice codes (FORMAT §6.5) ---- */

/* Returns k bits, at most 32, at a bit of packed numbers. */
INLINE uint32_t low_bits(const u8 *data, size n_bytes, size bit, int k) {
    size at = bit >> 3;
    uint64_t word = 0;
    if (at + 8 <= n_bytes)
        word = *(const u64 *)(data + at);
    else if (at < n_bytes)
        memcpy(&word, data + at, n_bytes - at);
    return (uint32_t)(word >> (bit & 7) & (((uint64_t)1 << k) - 1));
}

/* Returns whether bits behind the last of n numbers of k bits are zero. */
static int is_padded(const u8 *data, size n, int k) {
    int used = (int)(n * k & 7);
    return !used || !(data[n * k >> 3] >> used);
}

static PyObject *shifted_sum(PyObject *module, PyObject *args) {
    Py_buffer numbers;
    int k;
    if (!PyArg_ParseTuple(args, "y*i", &numbers, &k)) return NULL;
    uint64_t sum = 0;
    const u32 *number = numbers.buf;
    size n = numbers.len / 4;
    if (k < 0 || k > 31) return release(&numbers, 1, wrong_sizes());
    Py_BEGIN_ALLOW_THREADS
    for (size i = 0; i < n; i++) sum += number[i] >> k;
    Py_END_ALLOW_THREADS
    return release(&numbers, 1, PyLong_FromUnsignedLongLong(sum));
}

INLINE void pack_numbers(const void *numbers, size n, int k, u8 *out, int W) {
    uint64_t word = 0;
    int n_bits = 0;
    for (size i = 0; i < n; i++) {
        word |= (get(numbers, i, W) & (((uint64_t)1 << k) - 1)) << n_bits;
        for (n_bits += k; n_bits >= 8; n_bits -= 8, word >>= 8) *out++ = (u8)word;
    }
    if (n_bits) *out = (u8)word;
}

static PyObject *pack(PyObject *module, PyObject *args) {
    Py_buffer b[2];
    int width, k;
    if (!PyArg_ParseTuple(args, "y*iiw*", &b[0], &width, &k, &b[1])) return NULL;
    if (!IS_WIDTH(width) || k < 0 || k > 31) return release(b, 2, wrong_sizes());
    size n = b[0].len / width;
    if (b[1].len != (n * k + 7) / 8) return release(b, 2, wrong_sizes());
    Py_BEGIN_ALLOW_THREADS
    if (k) FOR_WIDTH(width, pack_numbers(b[0].buf, n, k, b[1].buf, W))
    Py_END_ALLOW_THREADS
    return release(b, 2, none());
}

static PyObject *unpack(PyObject *module, PyObject *args) {
    Py_buffer b[2];
    int k;
    if (!PyArg_ParseTuple(args, "y*iw*", &b[0], &k, &b[1])) return NULL;
    size n = b[1].len / 4;
    if (k < 0 || k > 31 || b[0].len != (n * k + 7) / 8) return release(b, 2, wrong_sizes());
    u32 *out = b[1].buf;
    Py_BEGIN_ALLOW_THREADS
    for (size i = 0; i < n; i++) out[i] = low_bits(b[0].buf, b[0].len, i * k, k);
    Py_END_ALLOW_THREADS
    return release(b, 2, none());
}

static PyObject *put_unary(PyObject *module, PyObject *args) {
    Py_buffer b[2];
    int k;
    size at; /* a bit of the bytes, which are zero from there on */
    if (!PyArg_ParseTuple(args, "y*iw*n", &b[0], &k, &b[1], &at)) return NULL;
    const u32 *number = b[0].buf;
    u8 *out = b[1].buf;
    size n = b[0].len / 4, n_bits = 8 * b[1].len;
    int fits = at >= 0 && k >= 0 && k <= 31;
    Py_BEGIN_ALLOW_THREADS
    for (size i = 0; fits && i < n; i++) {
        at += number[i] >> k;
        fits = at < n_bits;
        if (fits) out[at >> 3] |= (u8)(1 << (at & 7));
        at++;
    }
    Py_END_ALLOW_THREADS
    return release(b, 2, fits ? PyLong_FromSsize_t(at) : wrong_sizes());
}

enum { GOOD, TOO_WIDE, NOT_SO_MANY, NOT_PADDED };

typedef struct {
    const u8 *data;
    size n_bytes, at; /* next byte to load */
    uint64_t word;    /* ones not yet read, of the bits from `first` */
    size first, last; /* last: bit of the last one read, or -1 */
} Unary;

/* Returns how many zeros precede the next one; -1: there is none. */
INLINE int64_t next_count(Unary *unary) {
    while (!unary->word) {
        size left = unary->n_bytes - unary->at;
        if (left <= 0) return -1;
        unary->first = 8 * unary->at;
        if (left >= 8)
            unary->word = *(const u64 *)(unary->data + unary->at);
        else
            memcpy(&unary->word, unary->data + unary->at, left);
        unary->at += 8;
    }
    size one = unary->first + __builtin_ctzll(unary->word);
    int64_t count = one - unary->last - 1;
    unary->word &= unary->word - 1;
    unary->last = one;
    return count;
}

CLONED static int read_rice(const u8 *data, size n_bytes, const i64 *lengths, size n_sequences, size n_low_bytes, u32 *out) {
    Unary unary = {data + n_low_bytes, n_bytes - n_low_bytes, 0, 0, 0, -1};
    for (size s = 0; s < n_sequences; s++) {
        size n = lengths[2 * s];
        int k = (int)lengths[2 * s + 1];
        size n_here = (n * k + 7) / 8;
        for (size i = 0; i < n; i++) {
            int64_t count = next_count(&unary);
            if (count < 0) return NOT_SO_MANY;
            if ((uint64_t)count >> (32 - k)) return TOO_WIDE;
            *out++ = (uint32_t)count << k | low_bits(data, n_here, i * k, k);
        }
        if (!is_padded(data, n, k)) return NOT_PADDED;
        data += n_here;
    }
    /* The last one stands in the last byte. */
    return !unary.word && unary.last >> 3 == unary.n_bytes - 1 ? GOOD : NOT_SO_MANY;
}

static PyObject *decode_rice(PyObject *module, PyObject *args) {
    Py_buffer b[3];
    if (!PyArg_ParseTuple(args, "y*y*w*", &b[0], &b[1], &b[2])) return NULL;
    const i64 *lengths = b[1].buf;
    size n_sequences = b[1].len / 16, total = 0, n_low_bytes = 0, n_out = b[2].len / 4;
    for (size s = 0; s < n_sequences; s++) {
        int64_t n = lengths[2 * s], k = lengths[2 * s + 1];
        if (n < 0 || n > n_out - total || k < 0 || k > 31) return release(b, 3, wrong_sizes());
        total += n;
        n_low_bytes += (n * k + 7) / 8;
    }
    if (total != n_out || n_low_bytes > b[0].len) return release(b, 3, wrong_sizes());
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = read_rice(b[0].buf, b[0].len, lengths, n_sequences, n_low_bytes, b[2].buf);
    Py_END_ALLOW_THREADS
    if (status == TOO_WIDE) PyErr_SetString(Corrupt, "stream holds a number of more than 32 bits");
    if (status == NOT_PADDED) PyErr_SetString(Corrupt, "stream has a bit set behind packed numbers");
    if (status == NOT_SO_MANY) PyErr_Format(Corrupt, "stream does not hold exactly %zd numbers", total);
    return release(b, 3, status == GOOD ? none() : NULL);
}

/* ---- Subsets (FORMAT §6.5), and `gaps` and `bitmap` (§6.3, §6.4) ---- */

static PyObject *gaps_between(PyObject *module, PyObject *args) {
    Py_buffer b[2];
    if (!PyArg_ParseTuple(args, "y*w*", &b[0], &b[1])) return NULL;
    if (b[0].len != b[1].len) return release(b, 2, wrong_sizes());
    const u32 *number = b[0].buf;
    u32 *out = b[1].buf;
    size n = b[0].len / 4;
    Py_BEGIN_ALLOW_THREADS
    if (n) out[0] = number[0];
    for (size i = 1; i < n; i++) out[i] = number[i] - number[i - 1] - 1;
    Py_END_ALLOW_THREADS
    return release(b, 2, none());
}

static PyObject *numbers_from(PyObject *module, PyObject *args) {
    Py_buffer b[2];
    size bound;
    if (!PyArg_ParseTuple(args, "y*nw*", &b[0], &bound, &b[1])) return NULL;
    if (b[0].len != b[1].len) return release(b, 2, wrong_sizes());
    const u32 *gap = b[0].buf;
    u32 *out = b[1].buf;
    size n = b[0].len / 4;
    int64_t next = 0;
    Py_BEGIN_ALLOW_THREADS
    for (size i = 0; i < n; i++) {
        next += gap[i];
        out[i] = (uint32_t)next++;
    }
    Py_END_ALLOW_THREADS
    if (next > bound) {
        PyErr_Format(Corrupt, "stream chooses number %lld of %zd", (long long)next - 1, bound);
        return release(b, 2, NULL);
    }
    return release(b, 2, none());
}

static PyObject *others(PyObject *module, PyObject *args) {
    Py_buffer b[2];
    if (!PyArg_ParseTuple(args, "y*w*", &b[0], &b[1])) return NULL;
    const u32 *number = b[0].buf;
    u32 *out = b[1].buf;
    size n = b[0].len / 4, n_out = b[1].len / 4, found = 0, i = 0;
    Py_BEGIN_ALLOW_THREADS
    for (uint32_t next = 0; found < n_out; next++) {
        if (i < n && number[i] == next)
            i++;
        else
            out[found++] = next;
    }
    Py_END_ALLOW_THREADS
    return release(b, 2, none());
}

static PyObject *read_gaps(PyObject *module, PyObject *args) {
    Py_buffer b[2];
    size span;
    if (!PyArg_ParseTuple(args, "y*nw*", &b[0], &span, &b[1])) return NULL;
    const u8 *token = b[0].buf;
    u32 *out = b[1].buf;
    size n = b[0].len, nnz = b[1].len / 4, found = 0;
    int64_t at = 0; /* the next element that is neither touched nor passed over */
    Py_BEGIN_ALLOW_THREADS
    for (size i = 0; i < n && found <= nnz; i++) {
        at += token[i];
        if (token[i] == SKIP) continue;
        if (found < nnz) out[found] = (uint32_t)at;
        found++;
        at++;
    }
    Py_END_ALLOW_THREADS
    if (found != nnz || !n || token[n - 1] == SKIP) {
        PyErr_Format(Corrupt, "index stream does not hold exactly %zd positions", nnz);
        return release(b, 2, NULL);
    }
    if (at > span) {
        PyErr_Format(Corrupt, "index stream leaves its span of %zd elements", span);
        return release(b, 2, NULL);
    }
    return release(b, 2, none());
}

/* Puts down tokens while there is room, and returns how many there are. */
static PyObject *put_gaps(PyObject *module, PyObject *args) {
    Py_buffer b[2];
    if (!PyArg_ParseTuple(args, "y*w*", &b[0], &b[1])) return NULL;
    const u32 *position = b[0].buf;
    u8 *out = b[1].buf;
    size n = b[0].len / 4, room = b[1].len, found = 0;
    uint32_t next = 0;
    Py_BEGIN_ALLOW_THREADS
    for (size i = 0; i < n; i++) {
        uint32_t gap = position[i] - next;
        next = position[i] + 1;
        for (; gap >= SKIP; gap -= SKIP, found++)
            if (found < room) out[found] = SKIP;
        if (found < room) out[found] = (u8)gap;
        found++;
    }
    Py_END_ALLOW_THREADS
    return release(b, 2, PyLong_FromSsize_t(found));
}

static PyObject *put_bits(PyObject *module, PyObject *args) {
    Py_buffer b[2];
    if (!PyArg_ParseTuple(args, "y*w*", &b[0], &b[1])) return NULL;
    const u32 *position = b[0].buf;
    u8 *out = b[1].buf;
    size n = b[0].len / 4, n_bits = 8 * b[1].len;
    int fits = 1;
    Py_BEGIN_ALLOW_THREADS
    for (size i = 0; fits && i < n; i++) {
        fits = position[i] < n_bits;
        if (fits) out[position[i] >> 3] |= (u8)(1 << (position[i] & 7));
    }
    Py_END_ALLOW_THREADS
    return release(b, 2, fits ? none() : wrong_sizes());
}

/* Puts down where ones are while there is room, and returns how many there are. */
static PyObject *ones(PyObject *module, PyObject *args) {
    Py_buffer b[2];
    if (!PyArg_ParseTuple(args, "y*w*", &b[0], &b[1])) return NULL;
    Unary unary = {b[0].buf, b[0].len, 0, 0, 0, -1};
    u32 *out = b[1].buf;
    size room = b[1].len / 4, found = 0;
    Py_BEGIN_ALLOW_THREADS
    while (next_count(&unary) >= 0) {
        if (found < room) out[found] = (uint32_t)unary.last;
        found++;
    }
    Py_END_ALLOW_THREADS
    return release(b, 2, PyLong_FromSsize_t(found));
}

/* Sets the bits of cells, given as places in a tile of some rows and columns (§6.6); cells count from `first`. */
static PyObject *put_cells(PyObject *module, PyObject *args) {
    Py_buffer b[4];
    size n_columns, first, span;
    if (!PyArg_ParseTuple(args, "y*y*y*nnnw*", &b[0], &b[1], &b[2], &n_columns, &first, &span, &b[3])) return NULL;
    const u32 *place = b[0].buf;
    const i64 *rows = b[1].buf, *columns = b[2].buf;
    u8 *out = b[3].buf;
    size n = b[0].len / 4, n_across = b[2].len / 8, n_down = b[1].len / 8;
    int fits = span <= 8 * b[3].len && n_across > 0 && n_across <= UINT32_MAX, inside = 1;
    Py_BEGIN_ALLOW_THREADS
    for (size i = 0; fits && inside && i < n; i++) {
        uint32_t row = place[i] / (uint32_t)n_across, column = place[i] % (uint32_t)n_across;
        fits = row < n_down;
        if (!fits) break;
        int64_t at = rows[row] * n_columns + columns[column] - first;
        inside = at >= 0 && at < span;
        if (inside) out[at >> 3] |= (u8)(1 << (at & 7));
    }
    Py_END_ALLOW_THREADS
    if (!inside) PyErr_Format(Corrupt, "index stream leaves its span of %zd elements", span);
    return release(b, 4, !inside ? NULL : fits ? none() : wrong_sizes());
}

/* ---- Classes of elements (FORMAT §6.2) ---- */

INLINE u8 key_of(uint64_t bits, int width) { return width == 1 ? bits & 127 : (u8)(bits >> (8 * width - 9)); }

static PyObject *keys_of(PyObject *module, PyObject *args) {
    Py_buffer b[2];
    int width;
    if (!PyArg_ParseTuple(args, "y*iw*", &b[0], &width, &b[1])) return NULL;
    if (!IS_WIDTH(width) || b[0].len / width != b[1].len) return release(b, 2, wrong_sizes());
    u8 *out = b[1].buf;
    Py_BEGIN_ALLOW_THREADS
    FOR_WIDTH(width, for (size i = 0; i < b[1].len; i++) out[i] = key_of(get(b[0].buf, i, W), W))
    Py_END_ALLOW_THREADS
    return release(b, 2, none());
}

/* Puts down the keys of up to 64 elements from `first`; returns a one for each. */
INLINE uint64_t keys_from(const void *bits, size first, size n, u8 *key, int W) {
    if (n - first >= GROUP) {
        for (size i = 0; i < GROUP; i++) key[i] = key_of(get(bits, first + i, W), W);
        return ~(uint64_t)0;
    }
    memset(key, 0, GROUP);
    for (size i = 0; i < n - first; i++) key[i] = key_of(get(bits, first + i, W), W);
    return ((uint64_t)1 << (n - first)) - 1;
}

/* Returns which keys are below a threshold. */
INLINE uint64_t below(const u8 *key, u8 threshold) {
    u8 flags[GROUP];
    for (int i = 0; i < GROUP; i++) flags[i] = key[i] < threshold ? 255 : 0;
    return bits_of(flags);
}

/* What is known of a class on the way. In finding: which of its elements are chosen, or not if `rest`, is a
 * bitmap of `end` bits from byte `next`. In ranking: where its next rank goes, and where its ranks end. */
typedef struct { int64_t next, end, rank, rest; } Class;
enum { SLACK = 16 }; /* zero bytes after each bitmap */

/* Returns a word in which the lowest bits of `bits` stand where `mask` has ones. */
INLINE uint64_t deposit(uint64_t bits, uint64_t mask) {
    uint64_t word = 0;
#ifdef __x86_64__
    if (has_deposit) {
        __asm__("pdepq %2, %1, %0" : "=r"(word) : "r"(bits), "r"(mask));
        return word;
    }
#endif
    for (; mask; mask &= mask - 1, bits >>= 1) word |= bits & 1 ? mask & -mask : 0;
    return word;
}

/* Returns which elements of a class, its `mask`, are chosen. */
INLINE uint64_t chosen_of(Class *one, const u8 *bitmaps, uint64_t mask) {
    int64_t rank = one->rank;
    uint64_t bits = 0;
    one->rank += __builtin_popcountll(mask);
    if (rank < one->end) {
        const u8 *at = bitmaps + one->next + (rank >> 3);
        bits = *(const u64 *)at >> (rank & 7) | (uint64_t)at[8] << 1 << (63 - (rank & 7));
    }
    return deposit(bits ^ -(uint64_t)one->rest, mask);
}

INLINE size find_in(const void *bits, size n, size start, const u8 *threshold, int n_classes, Class *classes, const u8 *chosen, u32 *positions, u8 *keys, size found, size room, int W) {
    u8 key[GROUP];
    for (size first = 0; first < n; first += GROUP) {
        uint64_t touched = 0, left = keys_from(bits, first, n, key, W);
        for (int c = 0; c < n_classes - 1; c++) {
            uint64_t lower = left & below(key, threshold[c]);
            touched |= chosen_of(&classes[c], chosen, lower);
            left ^= lower;
        }
        touched |= chosen_of(&classes[n_classes - 1], chosen, left);
        if (__builtin_popcountll(touched) > room - found) return -1;
        for (; touched; touched &= touched - 1) {
            int i = __builtin_ctzll(touched);
            positions[found] = (uint32_t)(start + first + i);
            keys[found++] = key[i];
        }
    }
    return found;
}

CLONED static size find_any(const void *bits, size n, size start, int width, const u8 *threshold, int n_classes, Class *classes, const u8 *chosen, u32 *positions, u8 *keys, size found, size room) {
    FOR_WIDTH(width, found = find_in(bits, n, start, threshold, n_classes, classes, chosen, positions, keys, found, room, W))
    return found;
}

static int are_thresholds(const u8 *threshold, size n) {
    for (size i = 0; i < n; i++)
        if (threshold[i] <= (i ? threshold[i - 1] : 0)) return 0;
    return n < MAX_CLASSES;
}

static PyObject *find_chosen(PyObject *module, PyObject *args) {
    Py_buffer b[6];
    int width;
    size start, found;
    if (!PyArg_ParseTuple(args, "y*iny*w*y*w*w*n", &b[0], &width, &start, &b[1], &b[2], &b[3], &b[4], &b[5], &found))
        return NULL;
    size n_classes = b[1].len + 1, room = b[5].len;
    int fits = IS_WIDTH(width) && are_thresholds(b[1].buf, b[1].len) && b[2].len == n_classes * (size)sizeof(Class) &&
               b[4].len == 4 * room && found >= 0 && found <= room;
    Class classes[MAX_CLASSES];
    if (fits) memcpy(classes, b[2].buf, b[2].len);
    for (size c = 0; fits && c < n_classes; c++)
        fits = classes[c].next >= 0 && classes[c].end >= 0 && classes[c].rank >= 0 && classes[c].rest >> 1 == 0 &&
               classes[c].end / 8 + SLACK <= b[3].len - classes[c].next;
    if (!fits) return release(b, 6, wrong_sizes());
    Py_BEGIN_ALLOW_THREADS
    found = find_any(b[0].buf, b[0].len / width, start, width, b[1].buf, (int)n_classes, classes, b[3].buf, b[4].buf, b[5].buf, found, room);
    Py_END_ALLOW_THREADS
    memcpy(b[2].buf, classes, b[2].len);
    if (found < 0) PyErr_Format(Corrupt, "index stream does not hold exactly %zd positions", room);
    return release(b, 6, found < 0 ? NULL : PyLong_FromSsize_t(found));
}

INLINE int rank_in(const void *bits, size n, size start, const u8 *threshold, int n_classes, Class *classes, const u32 *positions, size n_positions, u32 *ranks, int W) {
    u8 key[GROUP], class_of[256];
    uint64_t members[MAX_CLASSES];
    size at = 0;
    for (int i = 0, c = 0; i < 256; i++) class_of[i] = (u8)(c += c < n_classes - 1 && i == threshold[c]);
    for (size first = 0; first < n; first += GROUP) {
        uint64_t left = keys_from(bits, first, n, key, W);
        for (int c = 0; c < n_classes - 1; c++) {
            members[c] = left & below(key, threshold[c]);
            left ^= members[c];
        }
        members[n_classes - 1] = left;
        for (; at < n_positions && positions[at] < start + first + GROUP; at++) {
            int64_t i = positions[at] - (start + first);
            if (i < 0 || i >= n - first) return 0;
            int c = class_of[key[i]];
            uint64_t earlier = members[c] & (((uint64_t)1 << i) - 1);
            if (classes[c].next >= classes[c].end) return 0;
            ranks[classes[c].next++] = (uint32_t)(classes[c].rank + __builtin_popcountll(earlier));
        }
        for (int c = 0; c < n_classes; c++) classes[c].rank += __builtin_popcountll(members[c]);
    }
    return at == n_positions;
}

CLONED static int rank_any(const void *bits, size n, size start, int width, const u8 *threshold, int n_classes, Class *classes, const u32 *positions, size n_positions, u32 *ranks) {
    int fits = 0;
    FOR_WIDTH(width, fits = rank_in(bits, n, start, threshold, n_classes, classes, positions, n_positions, ranks, W))
    return fits;
}

static PyObject *rank_chosen(PyObject *module, PyObject *args) {
    Py_buffer b[5];
    int width;
    size start;
    if (!PyArg_ParseTuple(args, "y*iny*w*y*w*", &b[0], &width, &start, &b[1], &b[2], &b[3], &b[4])) return NULL;
    size n_classes = b[1].len + 1;
    int fits = IS_WIDTH(width) && are_thresholds(b[1].buf, b[1].len) && b[2].len == n_classes * (size)sizeof(Class);
    Class classes[MAX_CLASSES];
    if (fits) memcpy(classes, b[2].buf, b[2].len);
    for (size c = 0; fits && c < n_classes; c++) fits = classes[c].next >= 0 && classes[c].end <= b[4].len / 4;
    if (!fits) return release(b, 5, wrong_sizes());
    Py_BEGIN_ALLOW_THREADS
    fits = rank_any(b[0].buf, b[0].len / width, start, width, b[1].buf, (int)n_classes, classes, b[3].buf, b[3].len / 4, b[4].buf);
    Py_END_ALLOW_THREADS
    memcpy(b[2].buf, classes, b[2].len);
    return release(b, 5, fits ? none() : wrong_sizes());
}

/* ---- `steps` (FORMAT §7.3) ---- */

static PyObject *count_keys(PyObject *module, PyObject *args) {
    Py_buffer b[2];
    if (!PyArg_ParseTuple(args, "y*w*", &b[0], &b[1])) return NULL;
    if (b[1].len != 256 * 8) return release(b, 2, wrong_sizes());
    const u8 *key = b[0].buf;
    i64 *counts = b[1].buf;
    Py_BEGIN_ALLOW_THREADS
    for (size i = 0; i < b[0].len; i++) counts[key[i]]++;
    Py_END_ALLOW_THREADS
    return release(b, 2, none());
}

/* Of each key: how many steps, how many long ones, how much longer than these have to be. */
static PyObject *step_statistics(PyObject *module, PyObject *args) {
    Py_buffer b[3];
    int width;
    if (!PyArg_ParseTuple(args, "y*iy*w*", &b[0], &width, &b[1], &b[2])) return NULL;
    if (!IS_WIDTH(width) || b[0].len / width != b[1].len || b[2].len != 3 * 256 * 8) return release(b, 3, wrong_sizes());
    const u8 *key = b[1].buf;
    i64 *sums = b[2].buf;
    Py_BEGIN_ALLOW_THREADS
    FOR_WIDTH(width, for (size i = 0; i < b[1].len; i++) {
        uint64_t beyond = get(b[0].buf, i, W) >> 1;
        sums[key[i]]++;
        sums[256 + key[i]] += beyond > 0;
        sums[512 + key[i]] += beyond ? beyond - 1 : 0;
    })
    Py_END_ALLOW_THREADS
    return release(b, 3, none());
}

/* Moves codes so that those of a class lie together; places[c]: where the next of class c goes. */
static PyObject *sort_codes(PyObject *module, PyObject *args) {
    Py_buffer b[5];
    int width;
    if (!PyArg_ParseTuple(args, "y*iy*y*w*w*", &b[0], &width, &b[1], &b[2], &b[3], &b[4])) return NULL;
    size n = b[1].len, n_classes = b[3].len / 8;
    int fits = IS_WIDTH(width) && b[0].len / width == n && b[4].len == b[0].len && b[2].len == 256;
    if (!fits) return release(b, 5, wrong_sizes());
    const u8 *key = b[1].buf, *table = b[2].buf;
    i64 *places = b[3].buf;
    Py_BEGIN_ALLOW_THREADS
    FOR_WIDTH(width, for (size i = 0; fits && i < n; i++) {
        int c = table[key[i]];
        fits = c < n_classes && places[c] >= 0 && places[c] < n;
        if (fits) put(b[4].buf, places[c]++, get(b[0].buf, i, W), W);
    })
    Py_END_ALLOW_THREADS
    return release(b, 5, fits ? none() : wrong_sizes());
}

/* Puts down which steps are longer than one unit, and how much longer than two; returns how many. */
static PyObject *long_steps(PyObject *module, PyObject *args) {
    Py_buffer b[3];
    int width;
    if (!PyArg_ParseTuple(args, "y*iw*w*", &b[0], &width, &b[1], &b[2])) return NULL;
    size n = IS_WIDTH(width) ? b[0].len / width : 0, found = 0;
    if (!IS_WIDTH(width) || b[1].len / 4 < n || b[2].len / 4 < n) return release(b, 3, wrong_sizes());
    u32 *where = b[1].buf, *excess = b[2].buf;
    Py_BEGIN_ALLOW_THREADS
    FOR_WIDTH(width, for (size i = 0; i < n; i++) {
        uint64_t beyond = get(b[0].buf, i, W) >> 1;
        where[found] = (uint32_t)i; /* found ≤ i */
        excess[found] = (uint32_t)(beyond - 1);
        found += beyond > 0;
    })
    Py_END_ALLOW_THREADS
    return release(b, 3, PyLong_FromSsize_t(found));
}

/* The codes of steps. `where` and `excess` list the long ones, class after class, from `next`; after those
 * of a class, at `end`, stands NOWHERE. Their `rank` is where the signs of a class begin. Without keys there is
 * one class. */
#define NOWHERE UINT32_MAX

INLINE int join_in(const u8 *signs, size n, const u8 *key, const u8 *table, Class *classes, const u32 *where, const u32 *excess, void *codes, int W) {
    uint64_t most = W < 4 ? ((uint64_t)1 << 8 * W) - 1 : UINT32_MAX;
    int64_t starts[MAX_CLASSES];
    for (int c = 0; c < MAX_CLASSES; c++) starts[c] = classes[c].rank;
    for (size i = 0; i < n; i++) {
        int c = key ? table[key[i]] : 0;
        int64_t at = classes[c].rank++, next = classes[c].next;
        if (at >= n) return 0;
        uint64_t is_long = where[next] == at - starts[c]; /* without a branch: no processor foresees it */
        uint64_t code = 1 + (signs[at >> 3] >> (at & 7) & 1) + (-is_long & 2 * ((uint64_t)excess[next] + 1));
        classes[c].next += is_long;
        if (code > most) return 0;
        put(codes, i, code, W);
    }
    return 1;
}

static PyObject *join_steps(PyObject *module, PyObject *args) {
    Py_buffer b[7];
    int width;
    if (!PyArg_ParseTuple(args, "y*y*y*y*y*y*w*i", &b[0], &b[1], &b[2], &b[3], &b[4], &b[5], &b[6], &width)) return NULL;
    Class classes[MAX_CLASSES] = {{0}};
    size n = IS_WIDTH(width) ? b[6].len / width : 0, n_classes = b[3].len / (size)sizeof(Class);
    const u8 *table = b[2].buf;
    int has_keys = b[1].len > 0;
    int fits = IS_WIDTH(width) && b[0].len == (n + 7) / 8 && b[2].len == 256 && b[4].len == b[5].len &&
               (!has_keys || b[1].len == n) && n_classes >= 1 && n_classes <= MAX_CLASSES;
    if (fits) memcpy(classes, b[3].buf, n_classes * sizeof(Class));
    for (int key = 0; fits && key < 256; key++) fits = table[key] < n_classes;
    for (size c = 0; fits && c < n_classes; c++)
        fits = classes[c].next >= 0 && classes[c].next <= classes[c].end && classes[c].end < b[4].len / 4 &&
               ((const u32 *)b[4].buf)[classes[c].end] == NOWHERE && classes[c].rank >= 0;
    if (!fits) return release(b, 7, wrong_sizes());
    if (!is_padded(b[0].buf, n, 1)) {
        PyErr_SetString(Corrupt, "stream has a bit set behind packed numbers");
        return release(b, 7, NULL);
    }
    int good = 0;
    Py_BEGIN_ALLOW_THREADS
    FOR_WIDTH(width, good = join_in(b[0].buf, n, has_keys ? b[1].buf : NULL, table, classes, b[4].buf, b[5].buf, b[6].buf, W))
    Py_END_ALLOW_THREADS
    if (!good) PyErr_Format(Corrupt, "value stream holds a code of more than %d bits", width < 4 ? 8 * width : 32);
    return release(b, 7, good ? none() : NULL);
}

/* ---- Values (FORMAT §7) ---- */

enum { TARGET, ULP_OF_INTEGERS, ULP_OF_FLOATS };

#define IN(value, W) ((W) == 8 ? (value) : (value) & (((uint64_t)1 << (8 * (W) & 63)) - 1))
#define TOP(W) ((uint64_t)1 << (8 * (W) - 1))

INLINE uint64_t place_of(uint64_t bits, int kind, int W) {
    if (kind != ULP_OF_FLOATS) return bits;
    return bits & TOP(W) ? IN(~bits, W) : bits | TOP(W);
}

INLINE uint64_t code_of(uint64_t before, uint64_t after, int kind, int W) {
    if (kind == TARGET) return after;
    uint64_t difference = IN(place_of(after, kind, W) - place_of(before, kind, W), W);
    return IN(difference << 1, W) ^ (difference & TOP(W) ? IN(~(uint64_t)0, W) : 0);
}

INLINE uint64_t value_of(uint64_t before, uint64_t code, int kind, int W) {
    if (kind == TARGET) return code;
    uint64_t difference = (code >> 1) ^ (code & 1 ? IN(~(uint64_t)0, W) : 0);
    uint64_t place = IN(difference + place_of(before, kind, W), W);
    if (kind != ULP_OF_FLOATS) return place;
    return place & TOP(W) ? place ^ TOP(W) : IN(~place, W);
}

INLINE void code_all(const void *before, const void *after, int kind, size n, void *codes, int W) {
    for (size i = 0; i < n; i++) put(codes, i, code_of(get(before, i, W), get(after, i, W), kind, W), W);
}

CLONED static void code_any(const void *before, const void *after, int kind, int width, size n, void *codes) {
    if (kind == ULP_OF_FLOATS) { FOR_WIDTH(width, code_all(before, after, ULP_OF_FLOATS, n, codes, W)) }
    else if (kind == ULP_OF_INTEGERS) { FOR_WIDTH(width, code_all(before, after, ULP_OF_INTEGERS, n, codes, W)) }
    else memcpy(codes, after, n * width);
}

INLINE void decode_all(const void *before, const void *codes, int kind, size n, void *after, int W) {
    for (size i = 0; i < n; i++) put(after, i, value_of(get(before, i, W), get(codes, i, W), kind, W), W);
}

CLONED static void decode_any(const void *before, const void *codes, int kind, int width, size n, void *after) {
    if (kind == ULP_OF_FLOATS) { FOR_WIDTH(width, decode_all(before, codes, ULP_OF_FLOATS, n, after, W)) }
    else if (kind == ULP_OF_INTEGERS) { FOR_WIDTH(width, decode_all(before, codes, ULP_OF_INTEGERS, n, after, W)) }
    else memcpy(after, codes, n * width);
}

static PyObject *values_with(PyObject *args, void (*work)(const void *, const void *, int, int, size, void *)) {
    Py_buffer b[3];
    int kind, width;
    if (!PyArg_ParseTuple(args, "y*y*iiw*", &b[0], &b[1], &kind, &width, &b[2])) return NULL;
    if (!IS_WIDTH(width) || b[0].len != b[1].len || b[0].len != b[2].len) return release(b, 3, wrong_sizes());
    Py_BEGIN_ALLOW_THREADS
    work(b[0].buf, b[1].buf, kind, width, b[0].len / width, b[2].buf);
    Py_END_ALLOW_THREADS
    return release(b, 3, none());
}

static PyObject *encode_values(PyObject *module, PyObject *args) { return values_with(args, code_any); }
static PyObject *decode_values(PyObject *module, PyObject *args) { return values_with(args, decode_any); }

/* Puts down where two blocks differ, counted from `start`, and what is there in each; returns how often. */
INLINE size compare_in(const void *old, const void *new, size n, size start, u32 *positions, void *before, void *after, int W) {
    size found = 0;
    for (size first = 0; first < n; first += GROUP) {
        size here = n - first < GROUP ? n - first : GROUP;
        const char *one = (const char *)old + first * W, *other = (const char *)new + first * W;
        uint64_t differ = 0;
        if (here == GROUP) {
            u8 flags[GROUP];
            for (int i = 0; i < GROUP; i++) flags[i] = get(one, i, W) != get(other, i, W) ? 255 : 0;
            differ = bits_of(flags);
        } else
            for (size i = 0; i < here; i++) differ |= (uint64_t)(get(one, i, W) != get(other, i, W)) << i;
        for (; differ; differ &= differ - 1) {
            int i = __builtin_ctzll(differ);
            positions[found] = (uint32_t)(start + first + i);
            put(before, found, get(one, i, W), W);
            put(after, found++, get(other, i, W), W);
        }
    }
    return found;
}

CLONED static size compare_any(const void *old, const void *new, int width, size n, size start, u32 *positions, void *before, void *after) {
    size found = 0;
    FOR_WIDTH(width, found = compare_in(old, new, n, start, positions, before, after, W))
    return found;
}

static PyObject *compare(PyObject *module, PyObject *args) {
    Py_buffer b[5];
    int width;
    size start, found;
    if (!PyArg_ParseTuple(args, "y*y*inw*w*w*", &b[0], &b[1], &width, &start, &b[2], &b[3], &b[4])) return NULL;
    size n = IS_WIDTH(width) ? b[0].len / width : -1;
    if (n < 0 || b[1].len != b[0].len || b[2].len / 4 < n || b[3].len / width < n || b[4].len / width < n)
        return release(b, 5, wrong_sizes());
    Py_BEGIN_ALLOW_THREADS
    found = compare_any(b[0].buf, b[1].buf, width, n, start, b[2].buf, b[3].buf, b[4].buf);
    Py_END_ALLOW_THREADS
    return release(b, 5, PyLong_FromSsize_t(found));
}

/* Changes a block at positions, which count from `start`; puts down what was there, and what is there now. */
INLINE int change_in(void *bits, size n, size start, const u32 *positions, size nnz, const void *codes, int kind, void *before, void *after, int W) {
    for (size i = 0; i < nnz; i++) {
        int64_t at = (int64_t)positions[i] - start;
        if (at < 0 || at >= n) return 0;
        uint64_t old = get(bits, at, W), new = value_of(old, get(codes, i, W), kind, W);
        put(before, i, old, W);
        put(after, i, new, W);
        put(bits, at, new, W);
    }
    return 1;
}

static PyObject *change(PyObject *module, PyObject *args) {
    Py_buffer b[5];
    int width, kind, fits;
    size start;
    if (!PyArg_ParseTuple(args, "w*iny*y*iw*w*", &b[0], &width, &start, &b[1], &b[2], &kind, &b[3], &b[4])) return NULL;
    size nnz = b[1].len / 4;
    fits = IS_WIDTH(width) && b[2].len / width == nnz && b[3].len / width >= nnz && b[4].len / width >= nnz;
    if (!fits) return release(b, 5, wrong_sizes());
    size n = b[0].len / width;
    Py_BEGIN_ALLOW_THREADS
    if (kind == ULP_OF_FLOATS) { FOR_WIDTH(width, fits = change_in(b[0].buf, n, start, b[1].buf, nnz, b[2].buf, ULP_OF_FLOATS, b[3].buf, b[4].buf, W)) }
    else { FOR_WIDTH(width, fits = change_in(b[0].buf, n, start, b[1].buf, nnz, b[2].buf, kind, b[3].buf, b[4].buf, W)) }
    Py_END_ALLOW_THREADS
    return release(b, 5, fits ? none() : wrong_sizes());
}

/* ---- The module ---- */

#define KERNEL(name) {#name, name, METH_VARARGS, NULL}

static PyMethodDef kernels[] = {
    KERNEL(shifted_sum), KERNEL(pack), KERNEL(unpack), KERNEL(put_unary), KERNEL(decode_rice),
    KERNEL(gaps_between), KERNEL(numbers_from), KERNEL(others), KERNEL(read_gaps), KERNEL(put_gaps), KERNEL(put_bits), KERNEL(ones), KERNEL(put_cells),
    KERNEL(keys_of), KERNEL(find_chosen), KERNEL(rank_chosen),
    KERNEL(count_keys), KERNEL(step_statistics), KERNEL(sort_codes), KERNEL(long_steps), KERNEL(join_steps),
    KERNEL(encode_values), KERNEL(decode_values), KERNEL(compare), KERNEL(change),
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", NULL, -1, kernels, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) {
    const char *wanted = getenv("SPARSEDELTA_KERNELS");
    if (wanted && !strcmp(wanted, "numpy")) {
        PyErr_SetString(PyExc_ImportError, "SPARSEDELTA_KERNELS asks for numpy");
        return NULL;
    }
    PyObject *errors = PyImport_ImportModule("sparsedelta.errors");
    if (!errors) return NULL;
    Corrupt = PyObject_GetAttrString(errors, "Corrupt");
    Py_DECREF(errors);
#ifdef __x86_64__
    __builtin_cpu_init();
    has_deposit = __builtin_cpu_supports("bmi2") && !__builtin_cpu_is("znver1") && !__builtin_cpu_is("znver2");
#endif
    PyObject *module = Corrupt ? PyModule_Create(&definition) : NULL;
    if (module && PyModule_AddIntConstant(module, "VERSION", 1)) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
