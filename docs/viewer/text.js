// Numbers, sizes and names as text for people.
"use strict";

(() => {
  const UNPRINTABLE = /[\p{C}\p{Zl}\p{Zp}]|(?! )\p{Zs}/gu;
  const grouped = new Intl.NumberFormat("en-US");

  /** Return a text with unprintable characters, such as those that reverse the direction, as escapes. */
  function printable(text) {
    return text.replace(UNPRINTABLE, (letter) => `\\u{${letter.codePointAt(0).toString(16)}}`);
  }

  /** Return a number with at most these significant digits, as the format `g` of C and Python does. */
  function general(value, digits) {
    if (value === 0) return "0";
    const [mantissa, exponent] = value.toExponential(digits - 1).split("e");
    if (exponent >= -4 && exponent < digits) return String(Number(value.toPrecision(digits)));
    const short = mantissa.includes(".") ? mantissa.replace(/\.?0+$/, "") : mantissa;
    return `${short}e${exponent[0]}${exponent.slice(1).padStart(2, "0")}`;
  }

  function threeDigits(value) {
    if (value >= 99.95) return grouped.format(Math.round(value));
    if (value >= 0.1) return value.toPrecision(3);
    return general(value, 2);
  }

  function count(number) {
    return grouped.format(number);
  }

  /** Return a size such as `1.23 MB`; 1 kB is 1000 bytes. */
  function size(nBytes) {
    let value = Number(nBytes);
    if (value < 1000) return `${value} B`;
    for (const unit of ["kB", "MB", "GB"]) {
      value /= 1000;
      if (value < 999.5) return `${threeDigits(value)} ${unit}`;
    }
    return `${threeDigits(value / 1000)} TB`;
  }

  /** Return a share as a percentage; only 0 and 1 give 0 % and 100 %. */
  function percent(share) {
    const value = share * 100;
    if (value === 0) return "0 %";
    if (value < 0.0001) return "<0.0001 %";
    if (value >= 99.95 && value < 100) return ">99.9 %";
    return `${threeDigits(value)} %`;
  }

  Object.assign(sparsedelta, { count, general, percent, printable, size });
})();
