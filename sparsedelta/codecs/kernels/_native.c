/* The inner loops of the codecs (FORMAT §6, §7) in C. The numpy code beside each call is the reference.
 * Both write the same bytes and reject the same streams.
 *
 * Rules for every function:
 * - Arguments are C-contiguous arrays of integers. `take` checks their item size.
 * - Every number that comes from a file or from a caller is checked before it becomes an index, a shift or a
 *   length. An invalid stream raises Corrupt; arrays that do not match each other raise ValueError.
 * - Loops run without the interpreter's lock and use no Python object.
 * - Arithmetic that may overflow uses unsigned numbers. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#if !defined(__GNUC__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__ || __SIZEOF_POINTER__ != 8
#error "for gcc and clang on 64-bit little-endian machines; on others sparsedelta uses numpy"
#endif

/* Compiles a function a second time for processors with AVX2. One version is chosen when the module is loaded. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && !defined(NO_CLONES)
#define CLONED __attribute__((target_clones("avx2", "default")))
#else
#define CLONED
#endif
static int has_deposit; /* the processor has a fast PDEP instruction */

#define INLINE static inline __attribute__((always_inline))

typedef Py_ssize_t size;
typedef uint8_t u8;
/* Integers at any address, because arrays may be unaligned. */
typedef uint16_t __attribute__((aligned(1), may_alias)) u16;
typedef uint32_t __attribute__((aligned(1), may_alias)) u32;
typedef uint64_t __attribute__((aligned(1), may_alias)) u64;
typedef int64_t __attribute__((aligned(1), may_alias)) i64;

static PyObject *Corrupt;

enum { MAX_CLASSES = 16, GROUP = 64, SKIP = 255 };

/* ---- Common to all kernels ---- */

/* Runs `call` with W, the width of an element, as a constant. */
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

/* Takes an argument of PyArg_ParseTuple ("O&"): a C-contiguous array of integers of `width` bytes each. If
 * `width` is 0, they may have 1, 2, 4 or 8 bytes. If a later argument is wrong, the interpreter calls this again
 * without an object, to release the array. */
static int take(PyObject *object, Py_buffer *array, size width, int flags) {
    if (!object) {
        PyBuffer_Release(array);
        return 1;
    }
    if (PyObject_GetBuffer(object, array, PyBUF_ND | PyBUF_FORMAT | flags)) return 0;
    const char *format = array->format ? array->format : "B";
    int is_integer = *format && strchr("bBhHiIlLqQ", *format) && !format[1];
    if (is_integer && (width ? array->itemsize == width : IS_WIDTH(array->itemsize))) return Py_CLEANUP_SUPPORTED;
    PyErr_Format(PyExc_TypeError, "array has items '%s' of %zd bytes, expected integers of %zd bytes (0: of 1, 2, 4 or 8)",
                 format, array->itemsize, width);
    PyBuffer_Release(array);
    return 0;
}

/* `in_…` takes an array to read, `out_…` an array to write; `…_any` takes integers of any size. */
#define TAKES(name, width, flags) \
    static int name(PyObject *object, void *array) { return take(object, array, width, flags); }
TAKES(in_any, 0, 0)
TAKES(in_u8, 1, 0)
TAKES(in_u32, 4, 0)
TAKES(in_i64, 8, 0)
TAKES(out_any, 0, PyBUF_WRITABLE)
TAKES(out_u8, 1, PyBUF_WRITABLE)
TAKES(out_u32, 4, PyBUF_WRITABLE)
TAKES(out_i64, 8, PyBUF_WRITABLE)

static size n_items(const Py_buffer *array) { return array->len / array->itemsize; }

/* Releases arrays and returns `result`. */
static PyObject *release(Py_buffer *arrays, int n, PyObject *result) {
    for (int i = 0; i < n; i++) PyBuffer_Release(&arrays[i]);
    return result;
}

static PyObject *wrong_sizes(void) {
    PyErr_SetString(PyExc_ValueError, "sizes of arrays do not match each other");
    return NULL;
}

static PyObject *none(void) {
    Py_INCREF(Py_None);
    return Py_None;
}

/* Packs 64 flags into 64 bits; each flag is a byte, 0 or 255. */
INLINE uint64_t bits_of(const u8 *flags) {
    uint64_t bits = 0;
#ifdef __x86_64__
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

/* Returns the k bits (0 ≤ k ≤ 32) that begin at bit number `bit` of `data`; bits after its end are zero. */
INLINE uint32_t low_bits(const u8 *data, size n_bytes, size bit, int k) {
    size at = bit >> 3;
    uint64_t word = 0;
    if (at + 8 <= n_bytes)
        word = *(const u64 *)(data + at);
    else if (at < n_bytes)
        memcpy(&word, data + at, n_bytes - at);
    return (uint32_t)(word >> (bit & 7) & (((uint64_t)1 << k) - 1));
}

/* Returns the 64 bits that begin at bit number `bit` of `data`; bits after its end are zero. */
INLINE uint64_t bits_from(const u8 *data, size n_bytes, size bit) {
    size at = bit >> 3;
    u8 last[9] = {0};
    if (at + 9 > n_bytes) {
        if (at < n_bytes) memcpy(last, data + at, n_bytes - at);
        data = last, at = 0;
    }
    return *(const u64 *)(data + at) >> (bit & 7) | (uint64_t)data[at + 8] << 1 << (63 - (bit & 7));
}

/* Returns whether the unused bits of the last byte are zero, after n packed numbers of k bits. */
static int is_padded(const u8 *data, size n, int k) {
    int used = (int)(n * k & 7);
    return !used || !(data[n * k >> 3] >> used);
}

static PyObject *shifted_sum(PyObject *module, PyObject *args) {
    Py_buffer numbers;
    int k;
    if (!PyArg_ParseTuple(args, "O&i", in_u32, &numbers, &k)) return NULL;
    uint64_t sum = 0;
    const u32 *number = numbers.buf;
    size n = n_items(&numbers);
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
        n_bits += k;
        if (n_bits >= 32) { /* n_bits < 64: k ≤ 31 */
            *(u32 *)out = (uint32_t)word;
            out += 4, word >>= 32, n_bits -= 32;
        }
    }
    for (; n_bits > 0; n_bits -= 8, word >>= 8) *out++ = (u8)word;
}

/* As pack_numbers with k = 1. */
INLINE void pack_bits(const void *numbers, size n, u8 *out, int W) {
    size i = 0;
    for (; i + GROUP <= n; i += GROUP, out += GROUP / 8) {
        u8 flags[GROUP];
        for (int j = 0; j < GROUP; j++) flags[j] = get(numbers, i + j, W) & 1 ? 255 : 0;
        *(u64 *)out = bits_of(flags);
    }
    pack_numbers((const u8 *)numbers + i * W, n - i, 1, out, W);
}

CLONED static void pack_any(const void *numbers, size n, int k, u8 *out, int width) {
    if (k == 1) { FOR_WIDTH(width, pack_bits(numbers, n, out, W)) }
    else if (k) { FOR_WIDTH(width, pack_numbers(numbers, n, k, out, W)) }
}

static PyObject *pack(PyObject *module, PyObject *args) {
    Py_buffer b[2];
    int k;
    if (!PyArg_ParseTuple(args, "O&iO&", in_any, &b[0], &k, out_u8, &b[1])) return NULL;
    size n = n_items(&b[0]);
    if (k < 0 || k > 31 || b[1].len != (n * k + 7) / 8) return release(b, 2, wrong_sizes());
    Py_BEGIN_ALLOW_THREADS
    pack_any(b[0].buf, n, k, b[1].buf, (int)b[0].itemsize);
    Py_END_ALLOW_THREADS
    return release(b, 2, none());
}

static PyObject *unpack(PyObject *module, PyObject *args) {
    Py_buffer b[2];
    int k;
    if (!PyArg_ParseTuple(args, "O&iO&", in_u8, &b[0], &k, out_u32, &b[1])) return NULL;
    size n = n_items(&b[1]);
    if (k < 0 || k > 31 || b[0].len != (n * k + 7) / 8) return release(b, 2, wrong_sizes());
    u32 *out = b[1].buf;
    Py_BEGIN_ALLOW_THREADS
    for (size i = 0; i < n; i++) out[i] = low_bits(b[0].buf, b[0].len, i * k, k);
    Py_END_ALLOW_THREADS
    return release(b, 2, none());
}

/* Writes each number without its low k bits in unary: that many zeros, then a one. The first goes to bit number `at`.
 * All bits from there on must be zero. Returns the number of the next bit. */
static PyObject *put_unary(PyObject *module, PyObject *args) {
    Py_buffer b[2];
    int k;
    size at;
    if (!PyArg_ParseTuple(args, "O&iO&n", in_u32, &b[0], &k, out_u8, &b[1], &at)) return NULL;
    const u32 *number = b[0].buf;
    u8 *out = b[1].buf;
    size n = n_items(&b[0]), n_bits = 8 * b[1].len;
    int fits = at >= 0 && at <= n_bits && k >= 0 && k <= 31;
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

/* Reads the positions of ones in a bit stream. */
typedef struct {
    const u8 *data;
    size n_bytes, at; /* at: the next byte to load */
    uint64_t word;    /* the 64 bits from bit number `first` on; ones that were read are cleared */
    size first, last; /* last: the number of the last bit that was read as a one; -1 at the beginning */
} Unary;

/* Moves to the next one. Returns the number of zeros before it; -1 if there are no more ones. */
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
    /* All ones must have been read, and the last byte must hold the last one. */
    return !unary.word && unary.last >> 3 == unary.n_bytes - 1 ? GOOD : NOT_SO_MANY;
}

/* Reads sequences of Rice codes; `lengths` holds the number of codes and k of each sequence. */
static PyObject *decode_rice(PyObject *module, PyObject *args) {
    Py_buffer b[3];
    if (!PyArg_ParseTuple(args, "O&O&O&", in_u8, &b[0], in_i64, &b[1], out_u32, &b[2])) return NULL;
    const i64 *lengths = b[1].buf;
    size n_sequences = n_items(&b[1]) / 2, total = 0, n_low_bytes = 0, n_out = n_items(&b[2]);
    if (n_items(&b[1]) % 2) return release(b, 3, wrong_sizes());
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
    if (status == NOT_PADDED) PyErr_SetString(Corrupt, "stream has a bit set after packed numbers");
    if (status == NOT_SO_MANY) PyErr_Format(Corrupt, "stream does not hold exactly %zd numbers", total);
    return release(b, 3, status == GOOD ? none() : NULL);
}

/* ---- Subsets (FORMAT §6.5), and `gaps` and `bitmap` (§6.3, §6.4) ---- */

/* Writes the gap before each of ascending numbers: how many numbers were skipped. */
static PyObject *gaps_between(PyObject *module, PyObject *args) {
    Py_buffer b[2];
    if (!PyArg_ParseTuple(args, "O&O&", in_u32, &b[0], out_u32, &b[1])) return NULL;
    if (b[0].len != b[1].len) return release(b, 2, wrong_sizes());
    const u32 *number = b[0].buf;
    u32 *out = b[1].buf;
    size n = n_items(&b[0]);
    Py_BEGIN_ALLOW_THREADS
    if (n) out[0] = number[0];
    for (size i = 1; i < n; i++) out[i] = number[i] - number[i - 1] - 1;
    Py_END_ALLOW_THREADS
    return release(b, 2, none());
}

/* Returns the number of bits in which a parameter k codes the gaps between ascending numbers. */
CLONED static uint64_t gap_bits(const u32 *number, size n, int k) {
    uint64_t sum = (uint64_t)n * (k + 1) + (number[0] >> k);
    for (size i = 1; i < n; i++) sum += (uint32_t)(number[i] - number[i - 1] - 1) >> k;
    return sum;
}

/* Returns the parameter that codes the gaps between n ascending numbers in the fewest bits, and these bits in `least`. */
static int best_parameter(const u32 *number, size n, uint64_t *least) {
    int guess = 0, best = 0;
    int64_t part = (int64_t)((double)((int64_t)number[n - 1] - (n - 1)) / (double)n * 0.7);
    while (part >> 1 && guess < 31) part >>= 1, guess++;
    *least = UINT64_MAX;
    for (int k = guess ? guess - 1 : 0; k <= guess + 1 && k <= 31; k++) {
        uint64_t bits = gap_bits(number, n, k);
        if (bits < *least) *least = bits, best = k;
    }
    return best;
}

static u8 *put_number(u8 *out, uint64_t number) {
    for (; number > 127; number >>= 7) *out++ = (u8)(number | 128);
    *out++ = (u8)number;
    return out;
}

enum { HEAD_BYTES = 16 }; /* more than the thresholds and the head of a subset take */

/* Writes a whole `rice` stream without classes: at least one ascending number. Returns its size in bytes; 0 if `room` bytes are
 * too few. */
static size write_rice(const u32 *number, size n, u8 *out, size room) {
    uint64_t n_bits;
    u8 *start = out;
    int k = best_parameter(number, n, &n_bits);
    size n_low = (n * k + 7) / 8, n_unary = (size)((n_bits - (uint64_t)n * k + 7) / 8);
    if (n_bits > (uint64_t)INT64_MAX || HEAD_BYTES + n_low + n_unary > room) return 0;
    *out++ = 0;
    out = put_number(put_number(out, 2 * (uint64_t)n), (uint64_t)k);
    u8 *low = out, *unary = out + n_low;
    memset(unary, 0, n_unary);
    uint64_t word = 0, mask = ((uint64_t)1 << k) - 1;
    size bit = 0;
    int held = 0;
    for (size i = 0; i < n; i++) {
        uint32_t gap = i ? number[i] - number[i - 1] - 1 : number[0];
        word |= (gap & mask) << held;
        held += k;
        if (held >= 32) { /* held < 64: k ≤ 31 */
            *(u32 *)low = (uint32_t)word;
            low += 4, word >>= 32, held -= 32;
        }
        bit += gap >> k;
        unary[bit >> 3] |= (u8)(1 << (bit & 7));
        bit++;
    }
    for (; held > 0; held -= 8, word >>= 8) *low++ = (u8)word;
    return unary + n_unary - start;
}

static PyObject *put_rice(PyObject *module, PyObject *args) {
    Py_buffer b[2];
    if (!PyArg_ParseTuple(args, "O&O&", in_u32, &b[0], out_u8, &b[1])) return NULL;
    size n = n_items(&b[0]), n_written = 0;
    if (n < 1 || n > INT32_MAX) return release(b, 2, wrong_sizes());
    Py_BEGIN_ALLOW_THREADS
    n_written = write_rice(b[0].buf, n, b[1].buf, b[1].len);
    Py_END_ALLOW_THREADS
    return release(b, 2, n_written ? PyLong_FromSsize_t(n_written) : wrong_sizes());
}

/* Writes ascending numbers with the given gaps: `gap[i]` numbers are skipped before number i. All are below `bound`. */
static PyObject *numbers_from(PyObject *module, PyObject *args) {
    Py_buffer b[2];
    size bound;
    if (!PyArg_ParseTuple(args, "O&nO&", in_u32, &b[0], &bound, out_u32, &b[1])) return NULL;
    if (b[0].len != b[1].len || bound < 0) return release(b, 2, wrong_sizes());
    const u32 *gap = b[0].buf;
    u32 *out = b[1].buf;
    size n = n_items(&b[0]);
    uint64_t next = 0; /* below 2^64: there are fewer than 2^31 gaps, each below 2^32 */
    int fits = n <= INT32_MAX;
    Py_BEGIN_ALLOW_THREADS
    for (size i = 0; fits && i < n; i++) {
        next += gap[i];
        out[i] = (uint32_t)next++;
    }
    Py_END_ALLOW_THREADS
    if (!fits) return release(b, 2, wrong_sizes());
    if (next > (uint64_t)bound) {
        PyErr_Format(Corrupt, "stream chooses number %llu of %zd", (unsigned long long)next - 1, bound);
        return release(b, 2, NULL);
    }
    return release(b, 2, none());
}

/* Writes the lowest numbers that the given ascending numbers do not contain, until `out` is full. */
static PyObject *others(PyObject *module, PyObject *args) {
    Py_buffer b[2];
    if (!PyArg_ParseTuple(args, "O&O&", in_u32, &b[0], out_u32, &b[1])) return NULL;
    const u32 *number = b[0].buf;
    u32 *out = b[1].buf;
    size n = n_items(&b[0]), n_out = n_items(&b[1]), found = 0, i = 0;
    Py_BEGIN_ALLOW_THREADS
    uint32_t next = 0;
    for (; found < n_out && i < n; next++) { /* no branch, because it could not be predicted */
        int is_given = number[i] == next;
        out[found] = next;
        found += !is_given, i += is_given;
    }
    for (; found < n_out; next++) out[found++] = next;
    Py_END_ALLOW_THREADS
    return release(b, 2, none());
}

/* Reads the positions from an index stream of the encoding `gaps`. */
static PyObject *read_gaps(PyObject *module, PyObject *args) {
    Py_buffer b[2];
    size span;
    if (!PyArg_ParseTuple(args, "O&nO&", in_u8, &b[0], &span, out_u32, &b[1])) return NULL;
    const u8 *token = b[0].buf;
    u32 *out = b[1].buf;
    size n = b[0].len, nnz = n_items(&b[1]), found = 0;
    int64_t at = 0; /* the first element that no token has covered yet */
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

/* Writes the tokens of ascending positions. Returns how many there are. Tokens that do not fit in
 * `out` are counted, but not written. */
static PyObject *put_gaps(PyObject *module, PyObject *args) {
    Py_buffer b[2];
    if (!PyArg_ParseTuple(args, "O&O&", in_u32, &b[0], out_u8, &b[1])) return NULL;
    const u32 *position = b[0].buf;
    u8 *out = b[1].buf;
    size n = n_items(&b[0]), room = b[1].len, found = 0;
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

/* Sets the bits with the given numbers. */
static PyObject *put_bits(PyObject *module, PyObject *args) {
    Py_buffer b[2];
    if (!PyArg_ParseTuple(args, "O&O&", in_u32, &b[0], out_u8, &b[1])) return NULL;
    const u32 *position = b[0].buf;
    u8 *out = b[1].buf;
    size n = n_items(&b[0]), n_bits = 8 * b[1].len;
    int fits = 1;
    Py_BEGIN_ALLOW_THREADS
    for (size i = 0; fits && i < n; i++) {
        fits = position[i] < n_bits;
        if (fits) out[position[i] >> 3] |= (u8)(1 << (position[i] & 7));
    }
    Py_END_ALLOW_THREADS
    return release(b, 2, fits ? none() : wrong_sizes());
}

/* Writes the numbers of the bits that are set. Returns how many there are. Numbers that do not fit in
 * `out` are counted, but not written. */
static PyObject *ones(PyObject *module, PyObject *args) {
    Py_buffer b[2];
    if (!PyArg_ParseTuple(args, "O&O&", in_u8, &b[0], out_u32, &b[1])) return NULL;
    Unary unary = {b[0].buf, b[0].len, 0, 0, 0, -1};
    u32 *out = b[1].buf;
    size room = n_items(&b[1]), found = 0;
    Py_BEGIN_ALLOW_THREADS
    while (next_count(&unary) >= 0) {
        if (found < room) out[found] = (uint32_t)unary.last;
        found++;
    }
    Py_END_ALLOW_THREADS
    return release(b, 2, PyLong_FromSsize_t(found));
}

/* Sets the bits of cells of a tile (§6.6). A tile consists of some `rows` and `columns` of the grid. A cell is given
 * by its place in the tile: row · n_across + column. Bit number 0 is cell number `first` of the grid. A row of the grid has
 * `n_columns` cells. */
static PyObject *put_cells(PyObject *module, PyObject *args) {
    Py_buffer b[4];
    size n_columns, first, span;
    if (!PyArg_ParseTuple(args, "O&O&O&nnnO&", in_u32, &b[0], in_i64, &b[1], in_i64, &b[2], &n_columns, &first, &span, out_u8, &b[3]))
        return NULL;
    const u32 *place = b[0].buf;
    const i64 *rows = b[1].buf, *columns = b[2].buf;
    u8 *out = b[3].buf;
    size n = n_items(&b[0]), n_down = n_items(&b[1]), n_across = n_items(&b[2]);
    int fits = span >= 0 && span <= 8 * b[3].len && n_across > 0 && n_across <= UINT32_MAX, inside = 1;
    Py_BEGIN_ALLOW_THREADS
    for (size i = 0; fits && inside && i < n; i++) {
        uint32_t row = place[i] / (uint32_t)n_across, column = place[i] % (uint32_t)n_across;
        fits = row < n_down;
        if (!fits) break;
        uint64_t at = (uint64_t)rows[row] * (uint64_t)n_columns + (uint64_t)columns[column] - (uint64_t)first;
        inside = at < (uint64_t)span; /* false also for a cell before the first one: it wraps around */
        if (inside) out[at >> 3] |= (u8)(1 << (at & 7));
    }
    Py_END_ALLOW_THREADS
    if (!inside) PyErr_Format(Corrupt, "index stream leaves its span of %zd elements", span);
    return release(b, 4, !inside ? NULL : fits ? none() : wrong_sizes());
}

/* ---- Classes of elements (FORMAT §6.2) ---- */

/* Returns the eight bits below the sign bit; an element of one byte has only seven. */
INLINE u8 key_of(uint64_t bits, int width) { return width == 1 ? bits & 127 : (u8)(bits >> (8 * width - 9)); }

CLONED static void keys_any(const void *bits, size n, int width, u8 *out) {
    FOR_WIDTH(width, for (size i = 0; i < n; i++) out[i] = key_of(get(bits, i, W), W))
}

/* Writes the key of every element. */
static PyObject *keys_of(PyObject *module, PyObject *args) {
    Py_buffer b[2];
    if (!PyArg_ParseTuple(args, "O&O&", in_any, &b[0], out_u8, &b[1])) return NULL;
    size n = n_items(&b[0]);
    if (n != b[1].len) return release(b, 2, wrong_sizes());
    Py_BEGIN_ALLOW_THREADS
    keys_any(b[0].buf, n, (int)b[0].itemsize, b[1].buf);
    Py_END_ALLOW_THREADS
    return release(b, 2, none());
}

enum { PORTABLE, AVX2, AVX512 }; /* the instructions that the search in classes and `compare` use */
static int instructions = PORTABLE;

/* Elements whose classes are found at once. */
enum { GROUPS = 32, BATCH = GROUPS * GROUP };

/* Sorts the elements of groups of 64 into classes by their keys. Writes for each class GROUPS words, of which the first
 * `n_groups` count; a bit is set for each element of the class. */
static void members_portable(const u8 *key, int n_groups, const u8 *threshold, int n_classes, uint64_t *members) {
    for (int g = 0; g < n_groups; g++, key += GROUP) {
        uint64_t before = 0;
        for (int c = 0; c < n_classes - 1; c++) {
            u8 flags[GROUP];
            for (int i = 0; i < GROUP; i++) flags[i] = key[i] < threshold[c] ? 255 : 0;
            uint64_t below = bits_of(flags);
            members[c * GROUPS + g] = below & ~before;
            before = below;
        }
        members[(n_classes - 1) * GROUPS + g] = ~before;
    }
}

#ifdef __x86_64__
__attribute__((target("avx2"))) static void members_avx2(const u8 *key, int n_groups, const u8 *threshold, int n_classes, uint64_t *members) {
    for (int g = 0; g < n_groups; g++, key += GROUP) {
        __m256i low = _mm256_loadu_si256((const __m256i *)key), high = _mm256_loadu_si256((const __m256i *)key + 1);
        uint64_t before = 0;
        for (int c = 0; c < n_classes - 1; c++) {
            __m256i most = _mm256_set1_epi8((char)(threshold[c] - 1)); /* a threshold is at least 1 */
            uint32_t first = (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_min_epu8(low, most), low));
            uint32_t second = (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_min_epu8(high, most), high));
            uint64_t below = first | (uint64_t)second << 32;
            members[c * GROUPS + g] = below & ~before;
            before = below;
        }
        members[(n_classes - 1) * GROUPS + g] = ~before;
    }
}

/* The processors since Ice Lake and Zen 4 have all of these. */
#define WIDE __attribute__((target("avx512f,avx512bw,avx512vbmi2,avx512vpopcntdq,bmi,bmi2,popcnt")))

static const u8 counting[GROUP] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                   22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
                                   44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};

WIDE static void members_avx512(const u8 *key, int n_groups, const u8 *threshold, int n_classes, uint64_t *members) {
    for (int g = 0; g < n_groups; g++, key += GROUP) {
        __m512i keys = _mm512_loadu_si512(key);
        uint64_t before = 0;
        for (int c = 0; c < n_classes - 1; c++) {
            uint64_t below = _mm512_cmplt_epu8_mask(keys, _mm512_set1_epi8((char)threshold[c]));
            members[c * GROUPS + g] = below & ~before;
            before = below;
        }
        members[(n_classes - 1) * GROUPS + g] = ~before;
    }
}
#endif

#ifdef __x86_64__
WIDE static void batch_keys_avx512(const u16 *bits, u8 *key) {
    for (int i = 0; i < BATCH; i += 32)
        _mm256_storeu_si256((__m256i *)(key + i), _mm512_cvtepi16_epi8(_mm512_srli_epi16(_mm512_loadu_si512(bits + i), 7)));
}
#endif

/* Writes the keys of at most BATCH elements from `first`, and zeros to the end of the last group. Returns how many elements. */
INLINE int batch_keys(const void *bits, size first, size n, u8 *key, int W) {
    int here = (int)(n - first < BATCH ? n - first : BATCH);
#ifdef __x86_64__
    if (W == 2 && here == BATCH && instructions == AVX512) {
        batch_keys_avx512((const u16 *)bits + first, key);
        return here;
    }
#endif
    for (int i = 0; i < here; i++) key[i] = key_of(get(bits, first + i, W), W);
    memset(key + here, 0, -here & (GROUP - 1));
    return here;
}

/* Writes the members of each class among the elements of a batch; bits after the last element are zero. Returns the
 * number of groups. */
static int members_of(const u8 *key, int here, const u8 *threshold, int n_classes, uint64_t *members) {
    int n_groups = (here + GROUP - 1) / GROUP, over = n_groups * GROUP - here;
#ifdef __x86_64__
    if (instructions == AVX512)
        members_avx512(key, n_groups, threshold, n_classes, members);
    else if (instructions == AVX2)
        members_avx2(key, n_groups, threshold, n_classes, members);
    else
#endif
        members_portable(key, n_groups, threshold, n_classes, members);
    for (int c = 0; over && c < n_classes; c++) members[c * GROUPS + n_groups - 1] &= ~(uint64_t)0 >> over;
    return n_groups;
}

static int best_instructions(void) {
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("bmi2"))
        return AVX512;
    if (__builtin_cpu_supports("avx2")) return AVX2;
#endif
    return PORTABLE;
}

/* Limits the instructions that the search in classes and `compare` use, for tests. Returns those in use. */
static PyObject *use_instructions(PyObject *module, PyObject *args) {
    int most, best = best_instructions();
    if (!PyArg_ParseTuple(args, "i", &most)) return NULL;
    instructions = most < PORTABLE ? PORTABLE : most < best ? most : best;
    return PyLong_FromLong(instructions);
}

/* The state of one class while the elements of a span are processed block by block. `rank` is the number of its elements
 * so far.
 * find_chosen: a bitmap of `end` bits begins at byte `next`. Its bit number `rank` is set if the element is chosen; if
 * `rest` is 1, it is set if the element is not chosen.
 * rank_chosen: the next rank is written at `next`; the ranks of the class end at `end`.
 * join_steps: see there. */
typedef struct { int64_t next, end, rank, rest; } Class;
enum { SLACK = 16 };                  /* zero bytes after each bitmap, so that words can be read past its end */
#define MAX_RANK ((int64_t)1 << 40)   /* above any count of elements, and far from overflow */

/* Moves the lowest bits of `bits`, in order, to the places where `mask` has ones. */
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

/* Adds to `touched` which elements of a class are chosen; `members` holds the class's elements in each group. */
INLINE void add_chosen(Class *one, const u8 *bitmaps, const uint64_t *members, int n_groups, uint64_t *touched) {
    const u8 *bitmap = bitmaps + one->next;
    int64_t rank = one->rank, end = one->end;
    uint64_t rest = -(uint64_t)one->rest;
    for (int g = 0; g < n_groups; g++) {
        uint64_t mask = members[g], bits = 0;
        if (rank < end) { /* the nine bytes lie within the bitmap and its slack */
            const u8 *at = bitmap + (rank >> 3);
            bits = *(const u64 *)at >> (rank & 7) | (uint64_t)at[8] << 1 << (63 - (rank & 7));
        }
        rank += __builtin_popcountll(mask);
        touched[g] |= deposit(bits ^ rest, mask);
    }
    one->rank = rank;
}

/* Writes positions and keys of the chosen elements of a group. */
INLINE size put_chosen(uint64_t touched, const u8 *key, size start, u32 *positions, u8 *keys, size found) {
    for (; touched; touched &= touched - 1) {
        int i = __builtin_ctzll(touched);
        positions[found] = (uint32_t)(start + i);
        keys[found++] = key[i];
    }
    return found;
}

INLINE size find_batch(const u8 *key, int here, size start, const u8 *threshold, int n_classes, Class *classes, const u8 *chosen, u32 *positions, u8 *keys, size found, size room) {
    uint64_t members[GROUPS * MAX_CLASSES], touched[GROUPS] = {0};
    int n_groups = members_of(key, here, threshold, n_classes, members);
    for (int c = 0; c < n_classes; c++) add_chosen(&classes[c], chosen, members + c * GROUPS, n_groups, touched);
    for (int g = 0; g < n_groups; g++) {
        if (__builtin_popcountll(touched[g]) > room - found) return -1;
        found = put_chosen(touched[g], key + GROUP * g, start + GROUP * g, positions, keys, found);
    }
    return found;
}

#ifdef __x86_64__
/* Runs `call` with N, the number of classes, as a constant, so that loops over the classes are unrolled. */
#define FOR_CLASSES(n, call)                     \
    switch (n) {                                 \
        case 2: { enum { N = 2 }; call; break; } \
        case 3: { enum { N = 3 }; call; break; } \
        case 4: { enum { N = 4 }; call; break; } \
        case 5: { enum { N = 5 }; call; break; } \
        case 6: { enum { N = 6 }; call; break; } \
        case 7: { enum { N = 7 }; call; break; } \
        case 8: { enum { N = 8 }; call; break; } \
        default: { const int N = n; call; }      \
    }

/* As find_batch, without a branch that depends on the elements. N: the number of classes, a constant. */
WIDE INLINE size find_batch_wide(const u8 *key, int here, size start, const u8 *threshold, Class *classes, const u8 *chosen, u32 *positions, u8 *keys, size found, size room, const int N) {
    __m512i numbers = _mm512_loadu_si512(counting), limits[MAX_CLASSES];
    /* places: the number of the next bit in `chosen`; last: from this byte on, 9 bytes are zero and within the slack */
    int64_t places[MAX_CLASSES], last[MAX_CLASSES];
    uint64_t rests[MAX_CLASSES];
    for (int c = 0; c < N; c++) {
        limits[c] = _mm512_set1_epi8((char)(c < N - 1 ? threshold[c] : 0));
        places[c] = 8 * classes[c].next + classes[c].rank;
        last[c] = classes[c].next + classes[c].end / 8 + SLACK - 9, rests[c] = -(uint64_t)classes[c].rest;
    }
    for (int first = 0; first < here; first += GROUP) {
        uint64_t inside = here - first < GROUP ? ~(uint64_t)0 >> (GROUP - (here - first)) : ~(uint64_t)0, earlier = 0, touched = 0;
        __m512i group = _mm512_loadu_si512(key + first);
        for (int c = 0; c < N; c++) {
            uint64_t below = c < N - 1 ? _mm512_cmplt_epu8_mask(group, limits[c]) & inside : inside;
            uint64_t members = below & ~earlier;
            int64_t n_members = __builtin_popcountll(members), place = places[c], byte = place >> 3;
            const u8 *at = chosen + (byte < last[c] ? byte : last[c]);
            uint64_t bits = *(const u64 *)at >> (place & 7);
            if (__builtin_expect(n_members > 57, 0)) bits |= (uint64_t)at[8] << 1 << (63 - (place & 7));
            touched |= _pdep_u64(bits ^ rests[c], members);
            places[c] = place + n_members, earlier = below;
        }
        size n_touched = __builtin_popcountll(touched), left = room - found;
        if (n_touched > left) return -1;
        if (left >= GROUP) { /* stores of whole vectors fit */
            __m512i where = _mm512_maskz_compress_epi8(touched, numbers), origin = _mm512_set1_epi32((int)(uint32_t)(start + first));
            _mm512_storeu_si512(keys + found, _mm512_maskz_compress_epi8(touched, group));
            size i = 0;
            do { /* once for up to 16 */
                _mm512_storeu_si512(positions + found + i, _mm512_add_epi32(_mm512_cvtepu8_epi32(_mm512_castsi512_si128(where)), origin));
                where = _mm512_shuffle_i64x2(where, where, 0x39), i += 16;
            } while (i < n_touched);
        } else
            put_chosen(touched, key + first, start + first, positions, keys, found);
        found += n_touched;
    }
    for (int c = 0; c < N; c++) classes[c].rank = places[c] - 8 * classes[c].next;
    return found;
}

WIDE static size find_batch_avx512(const u8 *key, int here, size start, const u8 *threshold, int n_classes, Class *classes, const u8 *chosen, u32 *positions, u8 *keys, size found, size room) {
    FOR_CLASSES(n_classes, found = find_batch_wide(key, here, start, threshold, classes, chosen, positions, keys, found, room, N))
    return found;
}
#endif

INLINE size find_in(const void *bits, size n, size start, const u8 *threshold, int n_classes, Class *classes, const u8 *chosen, u32 *positions, u8 *keys, size found, size room, int W) {
    u8 key[BATCH];
    for (size first = 0; first < n && found >= 0; first += BATCH) {
        int here = batch_keys(bits, first, n, key, W);
#ifdef __x86_64__
        if (instructions == AVX512)
            found = find_batch_avx512(key, here, start + first, threshold, n_classes, classes, chosen, positions, keys, found, room);
        else
#endif
            found = find_batch(key, here, start + first, threshold, n_classes, classes, chosen, positions, keys, found, room);
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

/* Copies the state of classes. Returns the number of classes; 0 if the state or the thresholds are invalid. */
static size take_classes(const Py_buffer *thresholds, const Py_buffer *state, Class *classes) {
    size n = thresholds->len + 1;
    if (!are_thresholds(thresholds->buf, thresholds->len) || state->len != n * (size)sizeof(Class)) return 0;
    memcpy(classes, state->buf, state->len);
    for (size c = 0; c < n; c++)
        if (classes[c].next < 0 || classes[c].end < 0 || classes[c].end > MAX_RANK || classes[c].rank < 0 || classes[c].rank > MAX_RANK)
            return 0;
    return n;
}

static int is_block(size start, size n) { return start >= 0 && start <= UINT32_MAX && n <= UINT32_MAX - start; }

/* Writes positions and keys of the chosen elements of a block, at index `found` of the output and after. The first
 * element of the block is number `start`. Returns the new value of `found`. */
static PyObject *find_chosen(PyObject *module, PyObject *args) {
    Py_buffer b[6];
    size start, found;
    if (!PyArg_ParseTuple(args, "O&nO&O&O&O&O&n", in_any, &b[0], &start, in_u8, &b[1], out_i64, &b[2], in_u8, &b[3], out_u32, &b[4], out_u8, &b[5], &found))
        return NULL;
    Class classes[MAX_CLASSES];
    size n = n_items(&b[0]), room = b[5].len, n_classes = take_classes(&b[1], &b[2], classes);
    int fits = n_classes && is_block(start, n) && n_items(&b[4]) == room && found >= 0 && found <= room;
    for (size c = 0; fits && c < n_classes; c++)
        fits = classes[c].rest >> 1 == 0 && classes[c].end / 8 + SLACK <= b[3].len - classes[c].next;
    if (!fits) return release(b, 6, wrong_sizes());
    Py_BEGIN_ALLOW_THREADS
    found = find_any(b[0].buf, n, start, (int)b[0].itemsize, b[1].buf, (int)n_classes, classes, b[3].buf, b[4].buf, b[5].buf, found, room);
    Py_END_ALLOW_THREADS
    memcpy(b[2].buf, classes, b[2].len);
    if (found < 0) PyErr_Format(Corrupt, "index stream does not hold exactly %zd positions", room);
    return release(b, 6, found < 0 ? NULL : PyLong_FromSsize_t(found));
}

#ifdef __x86_64__
WIDE INLINE void count_members_of(const u8 *key, int here, const u8 *threshold, const int N, uint64_t *members, uint64_t *before, uint64_t *n_before) {
    __m512i limits[8];
    for (int c = 0; c < N - 1; c++) limits[c] = _mm512_set1_epi8((char)threshold[c]);
    for (int first = 0; first < here; first += GROUP) {
        uint64_t *own = members + first / GROUP * 8;
        uint64_t inside = here - first < GROUP ? ~(uint64_t)0 >> (GROUP - (here - first)) : ~(uint64_t)0, earlier = 0;
        __m512i group = _mm512_loadu_si512(key + first);
        for (int c = 0; c < N; c++) {
            uint64_t below = c < N - 1 ? _mm512_cmplt_epu8_mask(group, limits[c]) & inside : inside;
            own[c] = below & ~earlier;
            earlier = below;
        }
    }
    __m512i counts = _mm512_loadu_si512(n_before);
    for (int first = 0; first < here; first += GROUP, members += 8, before += 8) {
        _mm512_storeu_si512(before, counts);
        counts = _mm512_add_epi64(counts, _mm512_popcnt_epi64(_mm512_loadu_si512(members)));
    }
    _mm512_storeu_si512(n_before, counts);
}

/* Writes for each group of a batch, and for each of 8 classes, the members and how many there are before the group. Adds to `n_before`. */
WIDE static void count_members_avx512(const u8 *key, int here, const u8 *threshold, int n_classes, uint64_t *members, uint64_t *before, uint64_t *n_before) {
    FOR_CLASSES(n_classes, count_members_of(key, here, threshold, N, members, before, n_before))
}

/* As rank_in for at most 8 classes. */
INLINE int rank_wide(const void *bits, size n, size start, const u8 *threshold, int n_classes, Class *classes, const u32 *positions, size n_positions, u32 *ranks, int W) {
    u8 key[BATCH], class_of[256];
    uint64_t members[GROUPS * 8] = {0}, before[GROUPS * 8], n_before[8] = {0};
    size at = 0;
    for (int i = 0, c = 0; i < 256; i++) class_of[i] = (u8)(c += c < n_classes - 1 && i == threshold[c]);
    int64_t next[8], end[8];
    for (int c = 0; c < n_classes; c++) n_before[c] = (uint64_t)classes[c].rank, next[c] = classes[c].next, end[c] = classes[c].end;
    for (size first = 0; first < n; first += BATCH) {
        int here = batch_keys(bits, first, n, key, W);
        count_members_avx512(key, here, threshold, n_classes, members, before, n_before);
        for (; at < n_positions && positions[at] < start + first + here; at++) {
            int64_t i = positions[at] - (start + first);
            if (i < 0) return 0;
            int c = class_of[key[i]], cell = 8 * (int)(i >> 6) + c;
            uint64_t earlier = members[cell] & (((uint64_t)1 << (i & 63)) - 1);
            if (next[c] >= end[c]) return 0;
            ranks[next[c]++] = (uint32_t)before[cell] + (uint32_t)__builtin_popcountll(earlier);
        }
    }
    for (int c = 0; c < n_classes; c++) classes[c].rank = (int64_t)n_before[c], classes[c].next = next[c];
    return at == n_positions;
}
#endif

INLINE int rank_in(const void *bits, size n, size start, const u8 *threshold, int n_classes, Class *classes, const u32 *positions, size n_positions, u32 *ranks, int W) {
    u8 key[BATCH], class_of[256];
    uint64_t members[GROUPS * MAX_CLASSES];
    uint32_t before[GROUPS * MAX_CLASSES]; /* elements of the class before the group */
    size at = 0;
    for (int i = 0, c = 0; i < 256; i++) class_of[i] = (u8)(c += c < n_classes - 1 && i == threshold[c]);
    for (size first = 0; first < n; first += BATCH) {
        int here = batch_keys(bits, first, n, key, W), n_groups = members_of(key, here, threshold, n_classes, members);
        for (int c = 0; c < n_classes; c++)
            for (int g = 0; g < n_groups; g++) {
                before[c * GROUPS + g] = (uint32_t)classes[c].rank;
                classes[c].rank += __builtin_popcountll(members[c * GROUPS + g]);
            }
        for (; at < n_positions && positions[at] < start + first + here; at++) {
            int64_t i = positions[at] - (start + first);
            if (i < 0) return 0;
            int c = class_of[key[i]], cell = c * GROUPS + (int)(i >> 6);
            uint64_t earlier = members[cell] & (((uint64_t)1 << (i & 63)) - 1);
            if (classes[c].next >= classes[c].end) return 0;
            ranks[classes[c].next++] = before[cell] + (uint32_t)__builtin_popcountll(earlier);
        }
    }
    return at == n_positions;
}

CLONED static int rank_any(const void *bits, size n, size start, int width, const u8 *threshold, int n_classes, Class *classes, const u32 *positions, size n_positions, u32 *ranks) {
    int fits = 0;
#ifdef __x86_64__
    if (instructions == AVX512 && n_classes <= 8) {
        FOR_WIDTH(width, fits = rank_wide(bits, n, start, threshold, n_classes, classes, positions, n_positions, ranks, W))
        return fits;
    }
#endif
    FOR_WIDTH(width, fits = rank_in(bits, n, start, threshold, n_classes, classes, positions, n_positions, ranks, W))
    return fits;
}

/* Writes the rank of each touched element of a block in its class. The first element of the block is number `start`. */
static PyObject *rank_chosen(PyObject *module, PyObject *args) {
    Py_buffer b[5];
    size start;
    if (!PyArg_ParseTuple(args, "O&nO&O&O&O&", in_any, &b[0], &start, in_u8, &b[1], out_i64, &b[2], in_u32, &b[3], out_u32, &b[4]))
        return NULL;
    Class classes[MAX_CLASSES];
    size n = n_items(&b[0]), n_classes = take_classes(&b[1], &b[2], classes);
    int fits = n_classes && is_block(start, n);
    for (size c = 0; fits && c < n_classes; c++) fits = classes[c].end <= n_items(&b[4]);
    if (!fits) return release(b, 5, wrong_sizes());
    Py_BEGIN_ALLOW_THREADS
    fits = rank_any(b[0].buf, n, start, (int)b[0].itemsize, b[1].buf, (int)n_classes, classes, b[3].buf, n_items(&b[3]), b[4].buf);
    Py_END_ALLOW_THREADS
    memcpy(b[2].buf, classes, b[2].len);
    return release(b, 5, fits ? none() : wrong_sizes());
}

/* ---- `steps` (FORMAT §7.3) ---- */

/* Adds the number of elements with each key to `counts`. */
static PyObject *count_keys(PyObject *module, PyObject *args) {
    Py_buffer b[2];
    if (!PyArg_ParseTuple(args, "O&O&", in_u8, &b[0], out_i64, &b[1])) return NULL;
    if (n_items(&b[1]) != 256) return release(b, 2, wrong_sizes());
    const u8 *key = b[0].buf;
    i64 *counts = b[1].buf;
    uint32_t found[4][256]; /* several, because equal keys are close to each other, and each would wait for the one before */
    Py_BEGIN_ALLOW_THREADS
    for (size i = 0; i < b[0].len;) {
        size end = b[0].len - i < UINT32_MAX ? b[0].len : i + UINT32_MAX;
        memset(found, 0, sizeof found);
        for (; i < end; i++) found[i & 3][key[i]]++;
        for (int k = 0; k < 256; k++) counts[k] += (int64_t)found[0][k] + found[1][k] + found[2][k] + found[3][k];
    }
    Py_END_ALLOW_THREADS
    return release(b, 2, none());
}

/* Adds three numbers for each key: steps; long steps (two units or more); the sum of the units above two. */
static PyObject *step_statistics(PyObject *module, PyObject *args) {
    Py_buffer b[3];
    if (!PyArg_ParseTuple(args, "O&O&O&", in_any, &b[0], in_u8, &b[1], out_i64, &b[2])) return NULL;
    if (n_items(&b[0]) != b[1].len || n_items(&b[2]) != 3 * 256) return release(b, 3, wrong_sizes());
    const u8 *key = b[1].buf;
    u64 *sums = b[2].buf; /* unsigned, because codes of 8 bytes may overflow */
    uint64_t found[2][256][3] = {{{0}}}; /* two, because equal keys are close to each other, and each would wait for the one before */
    Py_BEGIN_ALLOW_THREADS
    FOR_WIDTH(b[0].itemsize, for (size i = 0; i < b[1].len; i++) {
        uint64_t beyond = get(b[0].buf, i, W) >> 1;
        uint64_t *one = found[i & 1][key[i]];
        one[0]++;
        one[1] += beyond > 0;
        one[2] += beyond - (beyond > 0);
    })
    for (int k = 0; k < 3 * 256; k++) sums[k] += found[0][k & 255][k >> 8] + found[1][k & 255][k >> 8];
    Py_END_ALLOW_THREADS
    return release(b, 3, none());
}

#ifdef __x86_64__
/* Writes the thresholds of a table of classes. Returns the number of classes; 0 if they do not ascend with the keys, or are too many. */
static int thresholds_of(const u8 *table, u8 *threshold) {
    int n = 0;
    for (int key = 1; key < 256 && !table[0]; key++) {
        if (table[key] == table[key - 1]) continue;
        if (table[key] != table[key - 1] + 1 || n == MAX_CLASSES - 1) return 0;
        threshold[n++] = (u8)key;
    }
    return table[0] ? 0 : n + 1;
}

/* Sorts whole groups of 64 codes of 2 bytes, as sort_codes does. Returns how many; -1 if a code has no place. */
WIDE static size sort_avx512(const u16 *code, const u8 *key, size n, const u8 *threshold, int n_classes, i64 *places, u16 *out) {
    size first = 0;
    for (; first + GROUP <= n; first += GROUP) {
        __m512i group = _mm512_loadu_si512(key + first), halves[2] = {_mm512_loadu_si512(code + first), _mm512_loadu_si512(code + first + 32)};
        uint64_t earlier = 0;
        for (int c = 0; c < n_classes; c++) {
            uint64_t below = c < n_classes - 1 ? _mm512_cmplt_epu8_mask(group, _mm512_set1_epi8((char)threshold[c])) : ~(uint64_t)0, members = below & ~earlier;
            int64_t at = places[c], n_members = __builtin_popcountll(members);
            earlier = below;
            if (at < 0 || n_members > n - at) return -1;
            for (int half = 0; half < 2; half++) {
                uint32_t own = (uint32_t)(members >> 32 * half), n_own = (uint32_t)__builtin_popcount(own);
                _mm512_mask_storeu_epi16(out + at, (__mmask32)(((uint64_t)1 << n_own) - 1), _mm512_maskz_compress_epi16(own, halves[half]));
                at += n_own;
            }
            places[c] = at;
        }
    }
    return first;
}

/* As the loop of long_steps, for whole groups of 16 codes of 2 bytes. */
WIDE static size long_avx512(const u16 *code, size n, u32 *where, u32 *excess, size *found) {
    size first = 0;
    __m512i number = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)counting));
    for (; first + 16 <= n; first += 16, number = _mm512_add_epi32(number, _mm512_set1_epi32(16))) {
        __m512i beyond = _mm512_srli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(code + first))), 1);
        __mmask16 is_long = _mm512_test_epi32_mask(beyond, beyond);
        _mm512_storeu_si512(where + *found, _mm512_maskz_compress_epi32(is_long, number)); /* found ≤ first */
        _mm512_storeu_si512(excess + *found, _mm512_maskz_compress_epi32(is_long, _mm512_sub_epi32(beyond, _mm512_set1_epi32(1))));
        *found += __builtin_popcount(is_long);
    }
    return first;
}
#endif

/* Writes codes class by class. `table` holds the class of each key. `places` holds where the next code of each class
 * is written. */
static PyObject *sort_codes(PyObject *module, PyObject *args) {
    Py_buffer b[5];
    if (!PyArg_ParseTuple(args, "O&O&O&O&O&", in_any, &b[0], in_u8, &b[1], in_u8, &b[2], out_i64, &b[3], out_any, &b[4])) return NULL;
    size n = b[1].len, n_classes = n_items(&b[3]);
    int fits = n_items(&b[0]) == n && b[4].len == b[0].len && b[4].itemsize == b[0].itemsize && b[2].len == 256;
    if (!fits) return release(b, 5, wrong_sizes());
    const u8 *key = b[1].buf, *table = b[2].buf;
    i64 *places = b[3].buf;
    Py_BEGIN_ALLOW_THREADS
    size first = 0;
#ifdef __x86_64__
    u8 threshold[MAX_CLASSES];
    if (instructions == AVX512 && b[0].itemsize == 2 && thresholds_of(table, threshold) == n_classes)
        first = sort_avx512(b[0].buf, key, n, threshold, (int)n_classes, places, b[4].buf);
    fits = first >= 0;
#endif
    FOR_WIDTH(b[0].itemsize, for (size i = first; fits && i < n; i++) {
        int c = table[key[i]];
        fits = c < n_classes && places[c] >= 0 && places[c] < n;
        if (fits) put(b[4].buf, places[c]++, get(b[0].buf, i, W), W);
    })
    Py_END_ALLOW_THREADS
    return release(b, 5, fits ? none() : wrong_sizes());
}

/* Writes the numbers of the long steps (two units or more) and their units above two. Returns how many are long. */
static PyObject *long_steps(PyObject *module, PyObject *args) {
    Py_buffer b[3];
    if (!PyArg_ParseTuple(args, "O&O&O&", in_any, &b[0], out_u32, &b[1], out_u32, &b[2])) return NULL;
    size n = n_items(&b[0]), found = 0;
    if (n_items(&b[1]) < n || n_items(&b[2]) < n) return release(b, 3, wrong_sizes());
    u32 *where = b[1].buf, *excess = b[2].buf;
    Py_BEGIN_ALLOW_THREADS
    size first = 0;
#ifdef __x86_64__
    if (instructions == AVX512 && b[0].itemsize == 2) first = long_avx512(b[0].buf, n, where, excess, &found);
#endif
    FOR_WIDTH(b[0].itemsize, for (size i = first; i < n; i++) {
        uint64_t beyond = get(b[0].buf, i, W) >> 1;
        where[found] = (uint32_t)i; /* found ≤ i */
        excess[found] = (uint32_t)(beyond - 1);
        found += beyond > 0;
    })
    Py_END_ALLOW_THREADS
    return release(b, 3, PyLong_FromSsize_t(found));
}

/* Writes the codes of steps. `where` lists the long steps of each class, from `next` to `end` of the class. At `end` it
 * holds NOWHERE. `excess` holds their units above two. Signs are sorted by class; `rank` is the index of the first sign
 * of the class. Without keys there is one class. */
#define NOWHERE UINT32_MAX

INLINE int join_in(const u8 *signs, size first, size n, const u8 *key, const u8 *table, Class *classes, const int64_t *starts, const u32 *where, const u32 *excess, void *codes, int W) {
    uint64_t most = W < 4 ? ((uint64_t)1 << 8 * W) - 1 : UINT32_MAX;
    for (size i = first; i < n; i++) {
        int c = key ? table[key[i]] : 0;
        int64_t at = classes[c].rank++, next = classes[c].next;
        if (at >= n) return 0;
        uint64_t is_long = where[next] == at - starts[c]; /* no branch, because it could not be predicted */
        uint64_t code = 1 + (signs[at >> 3] >> (at & 7) & 1) + (-is_long & 2 * ((uint64_t)excess[next] + 1));
        classes[c].next += is_long;
        if (code > most) return 0;
        put(codes, i, code, W);
    }
    return 1;
}

#ifdef __x86_64__
/* As join_in, for whole groups of 64 codes of one or two bytes. Returns how many codes it wrote; -1 if join_in would refuse. The classes
 * must ascend with the keys; `threshold` holds the lowest keys of all but the first. */
WIDE INLINE size join_wide(const u8 *signs, size n, const u8 *key, const u8 *threshold, int n_classes, Class *classes, const int64_t *starts, const u32 *where, const u32 *excess, void *codes, int W) {
    uint64_t most = ((uint64_t)1 << 8 * W) - 1;
    __m512i limits[MAX_CLASSES];
    size first = 0, n_bytes = (n + 7) / 8;
    for (int c = 0; c < n_classes - 1; c++) limits[c] = _mm512_set1_epi8((char)threshold[c]);
    for (; first + GROUP <= n; first += GROUP) {
        __m512i group = key ? _mm512_loadu_si512(key + first) : _mm512_setzero_si512();
        uint64_t earlier = 0, sign = 0;
        u8 place[GROUP];  /* of the long steps of the group */
        uint32_t more[GROUP];
        int n_long = 0;
        for (int c = 0; c < n_classes; c++) {
            Class *one = &classes[c];
            uint64_t below = c < n_classes - 1 ? _mm512_cmplt_epu8_mask(group, limits[c]) : ~(uint64_t)0, members = below & ~earlier;
            earlier = below;
            int64_t n_members = __builtin_popcountll(members), at = one->rank;
            if (n_members > n - at) return -1;
            sign |= _pdep_u64(bits_from(signs, n_bytes, at), members);
            one->rank = at + n_members;
            for (int64_t from = at - starts[c], end = from + n_members, i; (i = where[one->next]) >= from && i < end; from = i + 1) {
                place[n_long] = (u8)__builtin_ctzll(_pdep_u64((uint64_t)1 << (i - (end - n_members)), members));
                more[n_long++] = excess[one->next++];
            }
        }
        if (W == 1)
            _mm512_storeu_si512((u8 *)codes + first, _mm512_mask_blend_epi8(sign, _mm512_set1_epi8(1), _mm512_set1_epi8(2)));
        else
            for (int half = 0; half < 2; half++)
                _mm512_storeu_si512((u16 *)codes + first + 32 * half, _mm512_mask_blend_epi16((__mmask32)(sign >> 32 * half), _mm512_set1_epi16(1), _mm512_set1_epi16(2)));
        for (int i = 0; i < n_long; i++) {
            size at = first + place[i];
            uint64_t code = get(codes, at, W) + 2 * ((uint64_t)more[i] + 1);
            if (code > most) return -1;
            put(codes, at, code, W);
        }
    }
    return first;
}

WIDE static size join_avx512(const u8 *signs, size n, const u8 *key, const u8 *table, int n_classes, Class *classes, const int64_t *starts, const u32 *where, const u32 *excess, void *codes, int width) {
    u8 threshold[MAX_CLASSES];
    if ((key ? thresholds_of(table, threshold) : 1) != n_classes) return 0;
    if (width == 1) return join_wide(signs, n, key, threshold, n_classes, classes, starts, where, excess, codes, 1);
    return join_wide(signs, n, key, threshold, n_classes, classes, starts, where, excess, codes, 2);
}
#endif

static PyObject *join_steps(PyObject *module, PyObject *args) {
    Py_buffer b[7];
    if (!PyArg_ParseTuple(args, "O&O&O&O&O&O&O&", in_u8, &b[0], in_u8, &b[1], in_u8, &b[2], in_i64, &b[3], in_u32, &b[4], in_u32, &b[5], out_any, &b[6]))
        return NULL;
    Class classes[MAX_CLASSES] = {{0}};
    size n = n_items(&b[6]), width = b[6].itemsize, n_long = n_items(&b[4]), n_classes = b[3].len / (size)sizeof(Class);
    const u8 *table = b[2].buf;
    const u32 *where = b[4].buf;
    int has_keys = b[1].len > 0;
    int fits = n < NOWHERE && b[0].len == (n + 7) / 8 && b[2].len == 256 && b[4].len == b[5].len && (!has_keys || b[1].len == n) &&
               n_classes >= 1 && n_classes <= MAX_CLASSES && b[3].len % (size)sizeof(Class) == 0;
    if (fits) memcpy(classes, b[3].buf, b[3].len);
    for (int key = 0; fits && key < 256; key++) fits = table[key] < n_classes;
    for (size c = 0; fits && c < n_classes; c++) {
        const Class *one = &classes[c];
        fits = one->next >= 0 && one->next <= one->end && one->end < n_long && where[one->end] == NOWHERE && one->rank >= 0 && one->rank <= n;
    }
    if (!fits) return release(b, 7, wrong_sizes());
    if (!is_padded(b[0].buf, n, 1)) {
        PyErr_SetString(Corrupt, "stream has a bit set after packed numbers");
        return release(b, 7, NULL);
    }
    int good = 0;
    Py_BEGIN_ALLOW_THREADS
    const u8 *key = has_keys ? b[1].buf : NULL;
    int64_t starts[MAX_CLASSES];
    size first = 0;
    for (int c = 0; c < MAX_CLASSES; c++) starts[c] = classes[c].rank;
#ifdef __x86_64__
    if (width <= 2 && instructions == AVX512) first = join_avx512(b[0].buf, n, key, table, (int)n_classes, classes, starts, b[4].buf, b[5].buf, b[6].buf, (int)width);
#endif
    if (first >= 0) { FOR_WIDTH(width, good = join_in(b[0].buf, first, n, key, table, classes, starts, b[4].buf, b[5].buf, b[6].buf, W)) }
    Py_END_ALLOW_THREADS
    if (!good) PyErr_Format(Corrupt, "value stream holds a code of more than %d bits", width < 4 ? 8 * (int)width : 32);
    return release(b, 7, good ? none() : NULL);
}

/* ---- Values (FORMAT §7) ---- */

enum { TARGET, ULP_OF_INTEGERS, ULP_OF_FLOATS, N_KINDS };

/* A number modulo 2^(8·W); the highest bit of W bytes. */

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
    else memmove(codes, after, n * width);
}

INLINE void decode_all(const void *before, const void *codes, int kind, size n, void *after, int W) {
    for (size i = 0; i < n; i++) put(after, i, value_of(get(before, i, W), get(codes, i, W), kind, W), W);
}

CLONED static void decode_any(const void *before, const void *codes, int kind, int width, size n, void *after) {
    if (kind == ULP_OF_FLOATS) { FOR_WIDTH(width, decode_all(before, codes, ULP_OF_FLOATS, n, after, W)) }
    else if (kind == ULP_OF_INTEGERS) { FOR_WIDTH(width, decode_all(before, codes, ULP_OF_INTEGERS, n, after, W)) }
    else memmove(after, codes, n * width);
}

static PyObject *values_with(PyObject *args, void (*work)(const void *, const void *, int, int, size, void *)) {
    Py_buffer b[3];
    int kind;
    if (!PyArg_ParseTuple(args, "O&O&iO&", in_any, &b[0], in_any, &b[1], &kind, out_any, &b[2])) return NULL;
    int fits = kind >= 0 && kind < N_KINDS && n_items(&b[0]) == n_items(&b[1]) && n_items(&b[0]) == n_items(&b[2]) &&
               b[0].len == b[1].len && b[0].len == b[2].len;
    if (!fits) return release(b, 3, wrong_sizes());
    Py_BEGIN_ALLOW_THREADS
    work(b[0].buf, b[1].buf, kind, (int)b[0].itemsize, n_items(&b[0]), b[2].buf);
    Py_END_ALLOW_THREADS
    return release(b, 3, none());
}

static PyObject *encode_values(PyObject *module, PyObject *args) { return values_with(args, code_any); }
static PyObject *decode_values(PyObject *module, PyObject *args) { return values_with(args, decode_any); }

/* Writes the numbers of the elements that differ between two blocks, and their bits in both blocks. The first element
 * is number `start`. Returns how many differ. */
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

#ifdef __x86_64__
/* As compare_in for elements of 2 bytes. Stores whole vectors: they fit, because at most as many elements were found as
 * compared. */
WIDE static size compare_avx512(const u16 *old, const u16 *new, size n, size start, u32 *positions, u16 *before, u16 *after) {
    __m512i numbers = _mm512_loadu_si512(counting);
    size found = 0, first = 0;
    for (; first + GROUP <= n; first += GROUP) {
        __m512i low = _mm512_loadu_si512(old + first), high = _mm512_loadu_si512(old + first + 32);
        __m512i new_low = _mm512_loadu_si512(new + first), new_high = _mm512_loadu_si512(new + first + 32);
        uint64_t differ = _mm512_cmpneq_epi16_mask(low, new_low) | (uint64_t)_mm512_cmpneq_epi16_mask(high, new_high) << 32;
        if (!differ) continue;
        __m512i places = _mm512_maskz_compress_epi8(differ, numbers), origin = _mm512_set1_epi32((int)(uint32_t)(start + first));
        for (int left = __builtin_popcountll(differ); left > 0; left -= 32) {
            __m256i half = _mm512_castsi512_si256(places);
            __m512i chosen = _mm512_cvtepu8_epi16(half);
            _mm512_storeu_si512(before + found, _mm512_permutex2var_epi16(low, chosen, high));
            _mm512_storeu_si512(after + found, _mm512_permutex2var_epi16(new_low, chosen, new_high));
            _mm512_storeu_si512(positions + found, _mm512_add_epi32(_mm512_cvtepu8_epi32(_mm256_castsi256_si128(half)), origin));
            if (left > 16) _mm512_storeu_si512(positions + found + 16, _mm512_add_epi32(_mm512_cvtepu8_epi32(_mm256_extracti128_si256(half, 1)), origin));
            places = _mm512_shuffle_i64x2(places, places, 0x4e); /* the other half */
            found += left < 32 ? left : 32;
        }
    }
    return found + compare_in(old + first, new + first, n - first, start + first, positions + found, before + found, after + found, 2);
}
#endif

CLONED static size compare_any(const void *old, const void *new, int width, size n, size start, u32 *positions, void *before, void *after) {
    size found = 0;
    FOR_WIDTH(width, found = compare_in(old, new, n, start, positions, before, after, W))
    return found;
}

static PyObject *compare(PyObject *module, PyObject *args) {
    Py_buffer b[5];
    size start, found;
    if (!PyArg_ParseTuple(args, "O&O&nO&O&O&", in_any, &b[0], in_any, &b[1], &start, out_u32, &b[2], out_any, &b[3], out_any, &b[4]))
        return NULL;
    size n = n_items(&b[0]), width = b[0].itemsize;
    int fits = is_block(start, n) && b[1].len == b[0].len && n_items(&b[2]) >= n;
    for (int i = 1; i < 5; i++)
        if (i != 2) fits = fits && b[i].itemsize == width && n_items(&b[i]) >= n;
    if (!fits) return release(b, 5, wrong_sizes());
    Py_BEGIN_ALLOW_THREADS
#ifdef __x86_64__
    if (width == 2 && instructions == AVX512)
        found = compare_avx512(b[0].buf, b[1].buf, n, start, b[2].buf, b[3].buf, b[4].buf);
    else
#endif
        found = compare_any(b[0].buf, b[1].buf, (int)width, n, start, b[2].buf, b[3].buf, b[4].buf);
    Py_END_ALLOW_THREADS
    return release(b, 5, PyLong_FromSsize_t(found));
}

/* Changes a block at positions. The first element is number `start`. Writes the bits before and after the change. The
 * loop in the middle is the one that the compiler turns into vector instructions. */
INLINE int change_in(void *bits, size n, size start, const u32 *positions, size nnz, const void *codes, int kind, void *before, void *after, int W) {
    for (size i = 0; i < nnz; i++) {
        int64_t at = (int64_t)positions[i] - start;
        if (at < 0 || at >= n) return 0;
        put(before, i, get(bits, at, W), W);
    }
    decode_all(before, codes, kind, nnz, after, W);
    for (size i = 0; i < nnz; i++) put(bits, (int64_t)positions[i] - start, get(after, i, W), W);
    return 1;
}

CLONED static int change_any(void *bits, size n, size start, const u32 *positions, size nnz, const void *codes, int kind, void *before, void *after, int width) {
    int fits = 0;
    if (kind == ULP_OF_FLOATS) { FOR_WIDTH(width, fits = change_in(bits, n, start, positions, nnz, codes, ULP_OF_FLOATS, before, after, W)) }
    else { FOR_WIDTH(width, fits = change_in(bits, n, start, positions, nnz, codes, kind, before, after, W)) }
    return fits;
}

static PyObject *change(PyObject *module, PyObject *args) {
    Py_buffer b[5];
    int kind;
    size start;
    if (!PyArg_ParseTuple(args, "O&nO&O&iO&O&", out_any, &b[0], &start, in_u32, &b[1], in_any, &b[2], &kind, out_any, &b[3], out_any, &b[4]))
        return NULL;
    size n = n_items(&b[0]), nnz = n_items(&b[1]), width = b[0].itemsize;
    int fits = is_block(start, n) && kind >= 0 && kind < N_KINDS;
    for (int i = 2; i < 5; i++) fits = fits && b[i].itemsize == width && n_items(&b[i]) == nnz;
    if (!fits) return release(b, 5, wrong_sizes());
    Py_BEGIN_ALLOW_THREADS
    fits = change_any(b[0].buf, n, start, b[1].buf, nnz, b[2].buf, kind, b[3].buf, b[4].buf, (int)width);
    Py_END_ALLOW_THREADS
    return release(b, 5, fits ? none() : wrong_sizes());
}

/* ---- Many small tensors (FORMAT §9, §10) ---- */

#include "_blake3.h"
#include "_small.h"
#include "_header.h"

/* ---- The module ---- */

#define KERNEL(name) {#name, name, METH_VARARGS, NULL}

static PyMethodDef kernels[] = {
    KERNEL(shifted_sum), KERNEL(pack), KERNEL(unpack), KERNEL(put_unary), KERNEL(decode_rice),
    KERNEL(gaps_between), KERNEL(put_rice), KERNEL(numbers_from), KERNEL(others), KERNEL(read_gaps), KERNEL(put_gaps), KERNEL(put_bits), KERNEL(ones), KERNEL(put_cells),
    KERNEL(keys_of), KERNEL(use_instructions), KERNEL(find_chosen), KERNEL(rank_chosen),
    KERNEL(count_keys), KERNEL(step_statistics), KERNEL(sort_codes), KERNEL(long_steps), KERNEL(join_steps),
    KERNEL(encode_values), KERNEL(decode_values), KERNEL(compare), KERNEL(change),
    KERNEL(rebuild_small), KERNEL(compare_small), KERNEL(digests_of), KERNEL(read_entries), KERNEL(put_entries),
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", NULL, -1, kernels, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) {
    PyObject *errors = PyImport_ImportModule("sparsedelta.errors");
    if (!errors) return NULL;
    Corrupt = PyObject_GetAttrString(errors, "Corrupt");
    Py_DECREF(errors);
#ifdef __x86_64__
    __builtin_cpu_init();
    has_deposit = __builtin_cpu_supports("bmi2") && !__builtin_cpu_is("znver1") && !__builtin_cpu_is("znver2");
#endif
    instructions = best_instructions();
    PyObject *module = Corrupt ? PyModule_Create(&definition) : NULL;
    if (module && PyModule_AddIntConstant(module, "VERSION", 5)) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
