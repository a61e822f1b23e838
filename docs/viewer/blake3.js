// BLAKE3 of bytes in memory, unkeyed, 32 bytes of output.
"use strict";

(() => {
  const IV = Uint32Array.of(
    0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
  );
  const PERMUTATION = [2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8];
  const [CHUNK_START, CHUNK_END, PARENT, ROOT] = [1, 2, 4, 8];
  const BLOCK = 64;
  const CHUNK = 1024;
  const ORDERS = [PERMUTATION.map((_, i) => i)]; // of the message words, in each of the seven rounds
  while (ORDERS.length < 7) ORDERS.push(PERMUTATION.map((i) => ORDERS.at(-1)[i]));

  const state = new Uint32Array(16);
  const words = new Uint32Array(16);

  function mix(a, b, c, d, x, y) {
    const v = state;
    let word;
    v[a] = v[a] + v[b] + x;
    word = v[d] ^ v[a];
    v[d] = (word >>> 16) | (word << 16);
    v[c] += v[d];
    word = v[b] ^ v[c];
    v[b] = (word >>> 12) | (word << 20);
    v[a] = v[a] + v[b] + y;
    word = v[d] ^ v[a];
    v[d] = (word >>> 8) | (word << 24);
    v[c] += v[d];
    word = v[b] ^ v[c];
    v[b] = (word >>> 7) | (word << 25);
  }

  /** Replace the chaining value `cv` by that after the block in `words`. */
  function compress(cv, counter, length, flags) {
    state.set(cv);
    state.set(IV.subarray(0, 4), 8);
    state[12] = counter; // taken modulo 2^32
    state[13] = Math.floor(counter / 2 ** 32);
    state[14] = length;
    state[15] = flags;
    const m = words;
    for (const o of ORDERS) {
      mix(0, 4, 8, 12, m[o[0]], m[o[1]]);
      mix(1, 5, 9, 13, m[o[2]], m[o[3]]);
      mix(2, 6, 10, 14, m[o[4]], m[o[5]]);
      mix(3, 7, 11, 15, m[o[6]], m[o[7]]);
      mix(0, 5, 10, 15, m[o[8]], m[o[9]]);
      mix(1, 6, 11, 12, m[o[10]], m[o[11]]);
      mix(2, 7, 8, 13, m[o[12]], m[o[13]]);
      mix(3, 4, 9, 14, m[o[14]], m[o[15]]);
    }
    for (let i = 0; i < 8; i++) cv[i] = state[i] ^ state[i + 8];
  }

  function loadBlock(data, begin, end) {
    words.fill(0);
    for (let i = begin; i < end; i++) words[(i - begin) >> 2] |= data[i] << (8 * ((i - begin) & 3));
  }

  function chunkValue(data, begin, end, number, isRoot) {
    const cv = IV.slice();
    let at = begin;
    do {
      const next = Math.min(at + BLOCK, end);
      const first = at === begin ? CHUNK_START : 0;
      const last = next === end ? CHUNK_END | (isRoot ? ROOT : 0) : 0;
      loadBlock(data, at, next);
      compress(cv, number, next - at, first | last);
      at = next;
    } while (at < end);
    return cv;
  }

  function parentValue(left, right, isRoot) {
    const cv = IV.slice();
    words.set(left);
    words.set(right, 8);
    compress(cv, 0, BLOCK, PARENT | (isRoot ? ROOT : 0));
    return cv;
  }

  /** Return the chaining value of the chunks that begin at `begin` and end at `end`. */
  function treeValue(data, begin, end, isRoot) {
    if (end - begin <= CHUNK) return chunkValue(data, begin, end, begin / CHUNK, isRoot);
    let left = CHUNK; // the largest power of two of chunks that leaves at least one byte
    while (2 * left < end - begin) left *= 2;
    const middle = begin + left;
    return parentValue(
      treeValue(data, begin, middle, false), treeValue(data, middle, end, false), isRoot,
    );
  }

  /** Return the hash of a Uint8Array: a Uint8Array of 32 bytes. */
  function blake3(data) {
    const out = new Uint8Array(32);
    treeValue(data, 0, data.length, true).forEach((word, i) => {
      for (let j = 0; j < 4; j++) out[4 * i + j] = word >>> (8 * j);
    });
    return out;
  }

  /** Return bytes as lower-case hexadecimal. */
  function hex(bytes) {
    return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  }

  Object.assign(sparsedelta, { blake3, hex });
})();
