// The error of the viewer: a file is refused with one of the codes of FORMAT §12.
"use strict";
globalThis.sparsedelta = {};

(() => {
  class Refused extends Error {
    /** code: a code of FORMAT §12; message: what is wrong, for a person. */
    constructor(code, message) {
      super(message);
      this.code = code;
    }
  }

  /** Throw Refused unless `ok` is true. */
  function check(ok, code, message) {
    if (!ok) throw new Refused(code, message);
  }

  Object.assign(sparsedelta, { Refused, check });
})();
