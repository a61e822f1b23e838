// The rules for paths of FORMAT §3.4.
"use strict";

(() => {
  const { check } = sparsedelta;
  const encoder = new TextEncoder();
  const FORBIDDEN = /[\x00-\x1f\x7f\\:*?"<>|]/;
  const RESERVED = /^(con|prn|aux|nul|(com|lpt)[0-9])$/i;

  function nBytes(text) {
    return encoder.encode(text).length;
  }

  /** Check the rules that concern one path. */
  function checkPath(path) {
    const parts = path.split("/");
    const isValid =
      parts.length <= 64 &&
      nBytes(path) <= 4096 &&
      !FORBIDDEN.test(path) &&
      parts.every((part) => part && nBytes(part) <= 255 && !/[. ]$/.test(part)) &&
      !parts.some((part) => part.toLowerCase() === ".git" || RESERVED.test(part.split(".")[0]));
    check(isValid, "corrupt", `the path ${JSON.stringify(path.slice(0, 60))} is not allowed`);
  }

  /** Return a letter, case-folded; the case mappings of JavaScript differ from folding in these two letters. */
  function foldedLetter(letter) {
    if (letter === "\u0131") return letter;
    if (letter === "\u1e9e") return "ss";
    return Array.from(letter.toUpperCase(), (upper) => upper.toLowerCase()).join("");
  }

  function folded(path) {
    return Array.from(path.normalize("NFC"), foldedLetter).join("").normalize("NFC");
  }

  /** Check that no two paths of the target are equal, and none is a parent folder of another. */
  function checkApart(paths) {
    const all = new Set(paths.map(folded));
    check(all.size === paths.length, "corrupt", "a path of the target occurs twice");
    for (const path of all) {
      for (let at = path.indexOf("/"); at >= 0; at = path.indexOf("/", at + 1)) {
        check(!all.has(path.slice(0, at)), "corrupt", "a path of the target is also a folder");
      }
    }
  }

  /** Check that paths ascend in the order of their UTF-8 bytes, which is that of their code points. */
  function checkSorted(paths) {
    for (let i = 1; i < paths.length; i++) {
      check(compareText(paths[i - 1], paths[i]) < 0, "corrupt", "paths are not sorted");
    }
  }

  function compareText(a, b) {
    let i = 0;
    while (i < a.length && a.charCodeAt(i) === b.charCodeAt(i)) i++;
    return (codePoint(a, i) ?? -1) - (codePoint(b, i) ?? -1);
  }

  /** Return the code point at i; a low surrogate sorts above all other units, as its pair would. */
  function codePoint(text, i) {
    const unit = text.charCodeAt(i);
    if (Number.isNaN(unit)) return undefined;
    return unit >= 0xd800 && unit <= 0xdfff ? unit + 0x10000 : unit;
  }

  Object.assign(sparsedelta, { checkApart, checkPath, checkSorted, nBytes });
})();
