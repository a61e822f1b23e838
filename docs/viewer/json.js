// JSON by the rules of FORMAT: compact JSON of a known form (§1.2), and strict JSON objects (§3.3).
"use strict";

(() => {
  const { Refused, check } = sparsedelta;
  const MAX_DEPTH = 64;
  const MAX_INTEGER = (1n << 63n) - 1n;
  const MAX_DIGITS = 400; // longer integers are kept as text
  const utf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
  const SHORT = { '"': '"', "\\": "\\", b: "\b", f: "\f", n: "\n", r: "\r", t: "\t" };
  const [QUOTE, BACKSLASH, MINUS, ZERO, NINE] = [0x22, 0x5c, 0x2d, 0x30, 0x39];

  function isDigit(byte) {
    return byte >= ZERO && byte <= NINE;
  }

  /** Return an integer as a number if that is exact, otherwise as a BigInt. */
  function exact(value) {
    return Number.isSafeInteger(Number(value)) ? Number(value) : value;
  }

  class Reader {
    constructor(data, what) {
      this.data = data;
      this.at = 0;
      this.what = what;
    }

    fail(expected) {
      throw new Refused("corrupt", `${this.what}, byte ${this.at}: expected ${expected}`);
    }

    decode(begin, end) {
      try {
        return utf8.decode(this.data.subarray(begin, end));
      } catch {
        return this.fail("UTF-8");
      }
    }

    /** Return the bytes of a string up to its end, as text that still has its escapes. */
    rawString() {
      if (this.data[this.at] !== QUOTE) this.fail("a string");
      const begin = ++this.at;
      let hasEscapes = false;
      for (let byte; (byte = this.data[this.at]) !== QUOTE; this.at++) {
        if (byte === undefined || byte < 0x20) this.fail("the end of a string");
        if (byte === BACKSLASH) {
          hasEscapes = true;
          this.at++;
        }
      }
      return [this.decode(begin, this.at++), hasEscapes];
    }

    end() {
      if (this.at !== this.data.length) this.fail("the end of the JSON");
    }
  }

  /** Reads compact JSON token by token; the caller knows the form. */
  class CompactReader extends Reader {
    skip(text) {
      if (!this.has(text)) this.fail(text);
    }

    has(text) {
      for (let i = 0; i < text.length; i++) {
        if (this.data[this.at + i] !== text.charCodeAt(i)) return false;
      }
      this.at += text.length;
      return true;
    }

    /** Return an integer from 0 to 2^63 − 1, as a BigInt if it is above 2^53. */
    integer() {
      const begin = this.at;
      let value = 0;
      for (; isDigit(this.data[this.at]); this.at++) value = value * 10 + this.data[this.at] - ZERO;
      const n = this.at - begin;
      if (n === 0 || n > 19 || (n > 1 && this.data[begin] === ZERO)) this.fail("an integer");
      if (n < 16) return value;
      const big = BigInt(this.decode(begin, this.at));
      if (big > MAX_INTEGER) this.fail("an integer below 2^63");
      return exact(big);
    }

    /** Return an integer that may also be −1. */
    integerOrMinusOne() {
      return this.has("-1") ? -1 : this.integer();
    }

    bit() {
      const value = this.integer();
      if (value !== 0 && value !== 1) this.fail("0 or 1");
      return value;
    }

    boolean() {
      if (this.has("true")) return true;
      this.skip("false");
      return false;
    }

    string() {
      const [raw, hasEscapes] = this.rawString();
      if (!hasEscapes) return raw;
      return raw.replace(/\\(["\\bfnrt]|u00[01][0-9a-f])|\\/gs, (_, escape) => {
        if (!escape) this.fail("an escape of compact JSON");
        if (escape.length === 1) return SHORT[escape];
        const letter = String.fromCharCode(parseInt(escape.slice(1), 16));
        if ("\b\f\n\r\t".includes(letter)) this.fail("an escape of compact JSON");
        return letter;
      });
    }

    /** Return a list whose items `read` reads, of at most `limit` items. */
    list(read, limit = Infinity) {
      const out = [];
      this.skip("[");
      if (this.has("]")) return out;
      do {
        check(out.length < limit, "limit_exceeded", `${this.what}: a list of more than ${limit} items`);
        out.push(read(this));
      } while (this.has(","));
      this.skip("]");
      return out;
    }

    /** Return an object with exactly the members of `readers`, in this order. */
    object(readers) {
      const out = {};
      Object.entries(readers).forEach(([name, read], i) => {
        this.skip(`${i ? "," : "{"}"${name}":`);
        out[name] = read(this);
      });
      this.skip("}");
      return out;
    }

    /** Return a list of fixed length whose items `readers` read. */
    tuple(...readers) {
      const out = readers.map((read, i) => {
        this.skip(i ? "," : "[");
        return read(this);
      });
      this.skip("]");
      return out;
    }
  }

  /** Reads any strict JSON; objects become Maps, which keep the order of all names. */
  class StrictReader extends Reader {
    space() {
      while ([0x20, 0x09, 0x0a, 0x0d].includes(this.data[this.at])) this.at++;
    }

    value(depth) {
      this.space();
      const letter = String.fromCharCode(this.data[this.at] ?? 0);
      if ("[{".includes(letter)) {
        if (depth >= MAX_DEPTH) this.fail(`at most ${MAX_DEPTH} levels`);
        this.at++;
        return letter === "[" ? this.items(depth + 1) : this.members(depth + 1);
      }
      if (letter === '"') return this.string();
      for (const [word, value] of [["true", true], ["false", false], ["null", null]]) {
        if (letter === word[0]) return this.word(word, value);
      }
      return this.number();
    }

    word(word, value) {
      for (const letter of word) {
        if (this.data[this.at++] !== letter.charCodeAt(0)) this.fail(word);
      }
      return value;
    }

    /** Call `read` for each part up to the bracket `close`. */
    parts(close, read) {
      this.space();
      if (this.data[this.at] === close) return void this.at++;
      for (;;) {
        read();
        this.space();
        const byte = this.data[this.at++];
        if (byte === close) return undefined;
        if (byte !== 0x2c) this.fail("a comma");
      }
    }

    items(depth) {
      const out = [];
      this.parts(0x5d, () => out.push(this.value(depth)));
      return out;
    }

    members(depth) {
      const out = new Map();
      this.parts(0x7d, () => {
        this.space();
        const name = this.string();
        if (out.has(name)) this.fail("a name that is not in the object yet");
        this.space();
        if (this.data[this.at++] !== 0x3a) this.fail("a colon");
        out.set(name, this.value(depth));
      });
      return out;
    }

    string() {
      const [raw, hasEscapes] = this.rawString();
      if (!hasEscapes) return raw;
      const text = raw.replace(/\\(["\\/bfnrt]|u[0-9a-fA-F]{4})|\\/gs, (_, escape) => {
        if (!escape) this.fail("an escape");
        if (escape.length > 1) return String.fromCharCode(parseInt(escape.slice(1), 16));
        return escape === "/" ? "/" : SHORT[escape];
      });
      if (/\p{Surrogate}/u.test(text)) this.fail("no lone surrogate");
      return text;
    }

    number() {
      const begin = this.at;
      const digits = () => {
        const from = this.at;
        while (isDigit(this.data[this.at])) this.at++;
        if (this.at === from) this.fail("a digit");
      };
      if (this.data[this.at] === MINUS) this.at++;
      if (this.data[this.at] === ZERO) this.at++;
      else digits();
      let isInteger = true;
      if (this.data[this.at] === 0x2e) {
        isInteger = false;
        this.at++;
        digits();
      }
      if ([0x45, 0x65].includes(this.data[this.at])) {
        isInteger = false;
        this.at++;
        if ([0x2b, MINUS].includes(this.data[this.at])) this.at++;
        digits();
      }
      const text = this.decode(begin, this.at);
      if (!isInteger) return Number.isFinite(Number(text)) ? Number(text) : text;
      return text.length > MAX_DIGITS ? text : exact(BigInt(text));
    }
  }

  /** Return the value of a strict JSON object (§3.3) as a Map. */
  function strictObject(data, what) {
    const reader = new StrictReader(data, what);
    const value = reader.value(0);
    reader.space();
    reader.end();
    check(value instanceof Map, "corrupt", `${what} is not a JSON object`);
    return value;
  }

  /** Return a value as JSON text; Maps are objects, and BigInts are exact. */
  function toJSON(value) {
    if (typeof value === "bigint") return String(value);
    if (Array.isArray(value)) return `[${value.map(toJSON).join(",")}]`;
    if (value === null || typeof value !== "object") return JSON.stringify(value);
    const entries = value instanceof Map ? [...value] : Object.entries(value);
    return `{${entries.map(([name, one]) => `${JSON.stringify(name)}:${toJSON(one)}`).join(",")}}`;
  }

  Object.assign(sparsedelta, { CompactReader, exact, strictObject, toJSON });
})();
