// One Zstandard frame (RFC 8878) with the restrictions of FORMAT §8: content size, no dictionary, window ≤ 2^27.
"use strict";

(() => {
  const { check } = sparsedelta;
  const MAX_WINDOW = 2 ** 27;
  const MAX_BLOCK = 2 ** 17;

  function ensure(ok, what) {
    check(ok, "corrupt", `damaged frame: ${what}`);
  }

  // ---- bits

  /** Reads bits from the end of bytes to their beginning, after the highest 1 of the last byte. */
  class BackwardBits {
    constructor(data) {
      ensure(data.length > 0 && data.at(-1) !== 0, "a stream of bits without an end");
      this.data = data;
      this.left = 8 * data.length + 23 - Math.clz32(data.at(-1)); // bits that are not read yet
    }

    /** Return the next n ≤ 25 bits without reading them; bits before the beginning are 0. */
    peek(n) {
      const from = this.left - n;
      if (from < 0) {
        return this.left <= 0 ? 0 : (this.at(0) & (2 ** this.left - 1)) << -from;
      }
      return (this.at(from >>> 3) >>> (from & 7)) & (2 ** n - 1);
    }

    at(byte) {
      const { data } = this;
      return data[byte] | (data[byte + 1] << 8) | (data[byte + 2] << 16) | (data[byte + 3] << 24);
    }

    /** Return the next n ≤ 31 bits. After more bits than there are, `left` is negative. */
    read(n) {
      if (n > 16) {
        const high = this.read(n - 16);
        return high * 2 ** 16 + this.read(16);
      }
      const value = this.peek(n);
      this.left -= n;
      return value;
    }
  }

  // ---- FSE

  /** Return the table of normalised counts; `probabilities` are at least -1. */
  function fseTable(probabilities, log) {
    const size = 1 << log;
    const table = { log, symbol: new Uint8Array(size), bits: new Uint8Array(size) };
    table.next = new Uint16Array(size);
    const seen = new Uint16Array(probabilities.length);
    let high = size;
    probabilities.forEach((count, symbol) => {
      seen[symbol] = Math.max(count, 1);
      if (count === -1) table.symbol[--high] = symbol;
    });
    let at = 0;
    probabilities.forEach((count, symbol) => {
      for (let i = 0; i < count; i++) {
        table.symbol[at] = symbol;
        do at = (at + (size >> 1) + (size >> 3) + 3) & (size - 1);
        while (at >= high);
      }
    });
    for (let state = 0; state < size; state++) {
      const number = seen[table.symbol[state]]++;
      table.bits[state] = log - (31 - Math.clz32(number));
      table.next[state] = (number << table.bits[state]) - size;
    }
    return table;
  }

  /** Return `[table, bytes read]` of a table description. */
  function readFseTable(data, maxLog, maxSymbol) {
    let bit = 0;
    const read = (n) => {
      let value = 0;
      for (let i = 0; i < n; i++, bit++) {
        ensure(bit < 8 * data.length, "a table is cut off");
        value |= ((data[bit >> 3] >> (bit & 7)) & 1) << i;
      }
      return value;
    };
    const log = read(4) + 5;
    ensure(log <= maxLog, "a table is too large");
    const probabilities = [];
    let left = 1 << log;
    while (left > 0) {
      const n = 32 - Math.clz32(left + 1);
      const low = (1 << (n - 1)) - 1;
      const unused = (1 << n) - 1 - (left + 1);
      let value = read(n - 1);
      if (value >= unused) {
        value |= read(1) << (n - 1);
        if (value > low) value -= unused;
      }
      const probability = value - 1;
      left -= Math.abs(probability);
      probabilities.push(probability);
      for (let more = probability === 0 ? 3 : 0; more === 3; ) {
        more = read(2);
        for (let i = 0; i < more; i++) probabilities.push(0);
      }
      ensure(probabilities.length <= maxSymbol + 1, "a table has too many symbols");
    }
    ensure(left === 0, "the probabilities of a table");
    return [fseTable(probabilities, log), (bit + 7) >> 3];
  }

  // ---- literals

  /** Return the weights that a tree description has as an FSE stream. */
  function fseWeights(data) {
    const [table, used] = readFseTable(data, 6, 255);
    const bits = new BackwardBits(data.subarray(used));
    const states = [bits.read(table.log), bits.read(table.log)];
    ensure(bits.left >= 0, "the weights of a tree");
    const weights = [];
    for (let turn = 0; ; turn ^= 1) {
      const state = states[turn];
      weights.push(table.symbol[state]);
      ensure(weights.length <= 254, "the weights of a tree");
      states[turn] = table.next[state] + bits.read(table.bits[state]);
      if (bits.left < 0) {
        weights.push(table.symbol[states[turn ^ 1]]);
        return weights;
      }
    }
  }

  /** Return `[tree, bytes read]`. */
  function readTree(data) {
    ensure(data.length > 0, "a tree is missing");
    const head = data[0];
    let weights;
    let used;
    if (head < 128) {
      used = 1 + head;
      ensure(used <= data.length, "a tree is cut off");
      weights = fseWeights(data.subarray(1, used));
    } else {
      used = 1 + ((head - 126) >> 1);
      ensure(used <= data.length, "a tree is cut off");
      const nibble = (i) => (i % 2 ? data[1 + (i >> 1)] & 15 : data[1 + (i >> 1)] >> 4);
      weights = Array.from({ length: head - 127 }, (_, i) => nibble(i));
    }
    let sum = 0;
    for (const weight of weights) {
      ensure(weight <= 11, "the weights of a tree");
      sum += weight ? 1 << (weight - 1) : 0;
    }
    ensure(sum > 0, "the weights of a tree");
    const log = 32 - Math.clz32(sum);
    const rest = (1 << log) - sum;
    ensure(log <= 11 && (rest & (rest - 1)) === 0, "the weights of a tree");
    weights.push(32 - Math.clz32(rest));
    const tree = { log, symbol: new Uint8Array(1 << log), bits: new Uint8Array(1 << log) };
    let at = 0;
    for (let weight = 1; weight <= log; weight++) {
      weights.forEach((own, symbol) => {
        if (own !== weight) return;
        const n = 1 << (weight - 1);
        tree.symbol.fill(symbol, at, at + n);
        tree.bits.fill(log + 1 - weight, at, at + n);
        at += n;
      });
    }
    return [tree, used];
  }

  function decodeHuffman(tree, data, out) {
    const bits = new BackwardBits(data);
    for (let i = 0; i < out.length; i++) {
      const entry = bits.peek(tree.log);
      out[i] = tree.symbol[entry];
      bits.left -= tree.bits[entry];
    }
    ensure(bits.left === 0, "a stream of literals");
  }

  function decodeStreams(tree, data, out) {
    ensure(data.length >= 10 && out.length >= 6, "four streams of literals");
    const each = (out.length + 3) >> 2;
    let from = 6;
    for (let i = 0; i < 4; i++) {
      const end = i < 3 ? from + data[2 * i] + data[2 * i + 1] * 256 : data.length;
      ensure(from < end && end <= data.length, "four streams of literals");
      decodeHuffman(tree, data.subarray(from, end), out.subarray(i * each, i < 3 ? (i + 1) * each : undefined));
      from = end;
    }
  }

  /** Return `[literals, bytes read]`; a new tree is kept in `frame`. */
  function readLiterals(data, frame) {
    ensure(data.length > 0, "a block is cut off");
    const type = data[0] & 3;
    const format = (data[0] >> 2) & 3;
    const number = (n) => {
      ensure(n <= data.length, "a block is cut off");
      let value = 0;
      for (let i = n - 1; i >= 0; i--) value = value * 256 + data[i];
      return value;
    };
    if (type < 2) {
      const used = [1, 2, 1, 3][format];
      const size = Math.floor(number(used) / (used === 1 ? 8 : 16));
      ensure(size <= frame.maxBlock, "too many literals");
      const end = used + (type ? 1 : size);
      ensure(end <= data.length, "literals are cut off");
      return [type ? new Uint8Array(size).fill(data[used]) : data.subarray(used, end), end];
    }
    const used = [3, 3, 4, 5][format];
    const width = [10, 10, 14, 18][format];
    const sizes = Math.floor(number(used) / 16);
    const size = sizes % 2 ** width;
    const end = used + Math.floor(sizes / 2 ** width);
    ensure(end <= data.length && size <= frame.maxBlock, "literals are cut off");
    let from = used;
    if (type === 2) {
      const [tree, n] = readTree(data.subarray(used, end));
      frame.tree = tree;
      from += n;
    }
    ensure(frame.tree, "a tree is missing");
    const literals = new Uint8Array(size);
    (format ? decodeStreams : decodeHuffman)(frame.tree, data.subarray(from, end), literals);
    return [literals, end];
  }

  // ---- sequences

  const ramp = (n, first, extra) => {
    const bits = [...Array(n).fill(0), ...extra];
    let base = first;
    return { bits, base: bits.map((width) => (base += 2 ** width) - 2 ** width) };
  };
  const LENGTHS = ramp(16, 0, [1, 1, 1, 1, 2, 2, 3, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]);
  const MATCHES = ramp(
    32, 3, [1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16],
  );
  const ones = (n) => Array(n).fill(1);
  const rare = (n) => Array(n).fill(-1);
  const KINDS = [
    { maxLog: 9, maxSymbol: 35, preset: fseTable(
      [4, 3, ...Array(11).fill(2), 1, 1, 1, ...Array(9).fill(2), 3, 2, ...ones(5), ...rare(4)], 6) },
    { maxLog: 8, maxSymbol: 31, preset: fseTable(
      [...ones(6), 2, 2, 2, ...ones(15), ...rare(5)], 5) },
    { maxLog: 9, maxSymbol: 52, preset: fseTable(
      [1, 4, 3, ...Array(6).fill(2), ...ones(37), ...rare(7)], 6) },
  ]; // literal lengths, offsets, match lengths

  /** Return `[bits, n]`: the stream of n sequences; tables are kept in `frame`. */
  function readTables(data, frame) {
    ensure(data.length > 0, "sequences are missing");
    let n = data[0];
    let at = 1;
    if (n >= 128) {
      at = n === 255 ? 3 : 2;
      ensure(at <= data.length, "sequences are cut off");
      n = n === 255 ? data[1] + data[2] * 256 + 0x7f00 : (n - 128) * 256 + data[1];
    }
    if (n === 0) {
      ensure(at === data.length, "bytes after the last sequence");
      return [null, 0];
    }
    ensure(at < data.length, "sequences are cut off");
    const modes = data[at++];
    ensure((modes & 3) === 0, "reserved bits");
    KINDS.forEach((kind, i) => {
      const mode = (modes >> (6 - 2 * i)) & 3;
      if (mode === 0) frame.tables[i] = kind.preset;
      if (mode === 1) {
        ensure(at < data.length && data[at] <= kind.maxSymbol, "the symbol of a table");
        frame.tables[i] = { log: 0, symbol: [data[at++]], bits: [0], next: [0] };
      }
      if (mode === 2) {
        const [table, used] = readFseTable(data.subarray(at), kind.maxLog, kind.maxSymbol);
        frame.tables[i] = table;
        at += used;
      }
      ensure(frame.tables[i], "a table is missing");
    });
    return [new BackwardBits(data.subarray(at)), n];
  }

  /** Return the distance of a match; `recent` holds the last three distances. */
  function distance(value, hasLiterals, recent) {
    if (value > 3) {
      recent.unshift(value - 3);
      recent.pop();
      return recent[0];
    }
    const i = value - 1 + (hasLiterals ? 0 : 1);
    const found = i === 3 ? recent[0] - 1 : recent[i];
    if (i > 0) {
      recent.splice(Math.min(i, 2), 1);
      recent.unshift(found);
    }
    return found;
  }

  function decodeBlock(data, frame) {
    const [literals, used] = readLiterals(data, frame);
    const [bits, n] = readTables(data.subarray(used), frame);
    const { out } = frame;
    const end = Math.min(out.length, frame.at + frame.maxBlock);
    let from = 0;
    const copyLiterals = (count) => {
      ensure(from + count <= literals.length && frame.at + count <= end, "the size of a block");
      out.set(literals.subarray(from, from + count), frame.at);
      from += count;
      frame.at += count;
    };
    const [lengths, offsets, matches] = frame.tables;
    let [a, b, c] = n ? [bits.read(lengths.log), bits.read(offsets.log), bits.read(matches.log)] : [];
    for (let i = 0; i < n; i++) {
      const code = offsets.symbol[b];
      const value = 2 ** code + bits.read(code);
      const match = MATCHES.base[matches.symbol[c]] + bits.read(MATCHES.bits[matches.symbol[c]]);
      const length = LENGTHS.base[lengths.symbol[a]] + bits.read(LENGTHS.bits[lengths.symbol[a]]);
      if (i < n - 1) {
        a = lengths.next[a] + bits.read(lengths.bits[a]);
        c = matches.next[c] + bits.read(matches.bits[c]);
        b = offsets.next[b] + bits.read(offsets.bits[b]);
      }
      ensure(bits.left >= 0, "sequences are cut off");
      copyLiterals(length);
      const back = distance(value, length > 0, frame.recent);
      ensure(back > 0 && back <= frame.at && frame.at + match <= end, "a match");
      if (back >= match) out.copyWithin(frame.at, frame.at - back, frame.at - back + match);
      else for (let j = frame.at; j < frame.at + match; j++) out[j] = out[j - back];
      frame.at += match;
    }
    ensure(!bits || bits.left === 0, "bits after the last sequence");
    copyLiterals(literals.length - from);
  }

  // ---- frames

  const MASK = (1n << 64n) - 1n;
  const PRIMES = [
    0x9e3779b185ebca87n, 0xc2b2ae3d27d4eb4fn, 0x165667b19e3779f9n, 0x85ebca77c2b2ae63n,
    0x27d4eb2f165667c5n,
  ];
  const rotate = (x, n) => ((x << n) | (x >> (64n - n))) & MASK;
  const round = (acc, word) => (rotate((acc + word * PRIMES[1]) & MASK, 31n) * PRIMES[0]) & MASK;

  /** Return the lower 32 bits of XXH64 with seed 0. */
  function checksum(data) {
    const view = new DataView(data.buffer, data.byteOffset, data.length);
    let at = 0;
    let hash = PRIMES[4];
    if (data.length >= 32) {
      const lanes = [PRIMES[0] + PRIMES[1], PRIMES[1], 0n, -PRIMES[0]].map((x) => x & MASK);
      for (; at + 32 <= data.length; at += 32) {
        for (let i = 0; i < 4; i++) lanes[i] = round(lanes[i], view.getBigUint64(at + 8 * i, true));
      }
      hash = [1n, 7n, 12n, 18n].reduce((sum, n, i) => sum + rotate(lanes[i], n), 0n) & MASK;
      for (const lane of lanes) hash = ((hash ^ round(0n, lane)) * PRIMES[0] + PRIMES[3]) & MASK;
    }
    hash = (hash + BigInt(data.length)) & MASK;
    for (; at + 8 <= data.length; at += 8) {
      hash ^= round(0n, view.getBigUint64(at, true));
      hash = (rotate(hash, 27n) * PRIMES[0] + PRIMES[3]) & MASK;
    }
    if (at + 4 <= data.length) {
      hash ^= (BigInt(view.getUint32(at, true)) * PRIMES[0]) & MASK;
      hash = (rotate(hash, 23n) * PRIMES[1] + PRIMES[2]) & MASK;
      at += 4;
    }
    for (; at < data.length; at++) {
      hash = (rotate(hash ^ ((BigInt(data[at]) * PRIMES[4]) & MASK), 11n) * PRIMES[0]) & MASK;
    }
    hash = ((hash ^ (hash >> 33n)) * PRIMES[1]) & MASK;
    hash = ((hash ^ (hash >> 29n)) * PRIMES[2]) & MASK;
    return Number((hash ^ (hash >> 32n)) & 0xffffffffn);
  }

  /** Return `{begin, window, hasChecksum}` of a frame whose content has `raw` bytes. */
  function readHead(data, raw) {
    const number = (from, n) => {
      ensure(from + n <= data.length, "it is cut off");
      let value = 0;
      for (let i = from + n - 1; i >= from; i--) value = value * 256 + data[i];
      return value;
    };
    ensure(number(0, 4) === 0xfd2fb528, "it does not begin as a frame");
    const flags = number(4, 1);
    const isSingle = (flags & 32) !== 0;
    ensure((flags & 8) === 0, "a reserved bit");
    let at = 5;
    let window = 0;
    if (!isSingle) {
      const code = number(at++, 1);
      const base = 2 ** (10 + (code >> 3));
      window = base + (base / 8) * (code & 7);
    }
    const nDictionary = [0, 1, 2, 4][flags & 3];
    ensure(number(at, nDictionary) === 0, "a dictionary");
    at += nDictionary;
    const nSize = [isSingle ? 1 : 0, 2, 4, 8][flags >> 6];
    ensure(nSize > 0, "no content size");
    const size = number(at, nSize) + (nSize === 2 ? 256 : 0);
    ensure(size === raw, "another content size");
    if (isSingle) window = size;
    ensure(window <= MAX_WINDOW, "a window above 2^27 bytes");
    return { begin: at + nSize, window, hasChecksum: (flags & 4) !== 0 };
  }

  /**
   * Return the content of a frame.
   *
   * data: the bytes of the frame and nothing else.
   * raw: size of the content in bytes; the caller has checked it against its limit.
   */
  function decompress(data, raw) {
    const head = readHead(data, raw);
    const frame = {
      out: new Uint8Array(raw),
      at: 0,
      maxBlock: Math.min(head.window, MAX_BLOCK),
      recent: [1, 4, 8],
      tables: [null, null, null],
      tree: null,
    };
    let at = head.begin;
    for (let isLast = false; !isLast; ) {
      ensure(at + 3 <= data.length, "it is cut off");
      const block = data[at] | (data[at + 1] << 8) | (data[at + 2] << 16);
      at += 3;
      isLast = (block & 1) !== 0;
      const type = (block >> 1) & 3;
      const size = block >> 3;
      ensure(type < 3 && size <= frame.maxBlock, "the head of a block");
      const stored = type === 1 ? 1 : size;
      ensure(at + stored <= data.length, "it is cut off");
      const bytes = data.subarray(at, at + stored);
      at += stored;
      if (type === 2) {
        decodeBlock(bytes, frame);
        continue;
      }
      ensure(frame.at + size <= raw, "too much content");
      if (type === 1) frame.out.fill(bytes[0], frame.at, frame.at + size);
      else frame.out.set(bytes, frame.at);
      frame.at += size;
    }
    ensure(frame.at === raw, "too little content");
    if (head.hasChecksum) {
      ensure(at + 4 <= data.length, "it is cut off");
      const view = new DataView(data.buffer, data.byteOffset + at, 4);
      ensure(view.getUint32(0, true) === checksum(frame.out), "the checksum");
      at += 4;
    }
    ensure(at === data.length, "bytes after the frame");
    return frame.out;
  }

  Object.assign(sparsedelta, { decompress });
})();
