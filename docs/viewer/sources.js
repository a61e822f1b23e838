// Where a delta comes from: a file on this computer, or an address that is read by HTTP range requests.
"use strict";

(() => {
  const { Refused } = sparsedelta;
  const HUB = "https://huggingface.co";
  const NAME = "[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}";
  const REFERENCE = new RegExp(`^(?:hf://)?(${NAME}/${NAME})(?:@([^/\\s]+))?(?:/([^\\s@]+?))?/?(?:@(\\S+))?$`);

  /** Return a source of a File. */
  function fileSource(file) {
    return {
      name: file.name,
      size: file.size,
      read: async (offset, n) => new Uint8Array(await file.slice(offset, offset + n).arrayBuffer()),
    };
  }

  /** Return the address of what a person wrote: an address, or a repository of the Hub. */
  function addressOf(text) {
    const given = text.trim();
    if (/^https?:\/\//.test(given)) return given;
    const found = REFERENCE.exec(given);
    if (!found) {
      throw new Refused("usage", "write org/name, org/name@revision, hf://org/name/path@revision or an address");
    }
    const [, id, first, path, last] = found;
    const file = !path ? "delta.sd" : path.endsWith(".sd") ? path : `${path}/delta.sd`;
    const parts = file.split("/").map(encodeURIComponent).join("/");
    return `${HUB}/${id}/resolve/${encodeURIComponent(first ?? last ?? "main")}/${parts}`;
  }

  /** Return the size of the whole file that an answer states, or null. */
  function statedSize(response) {
    const range = /\/([0-9]{1,15})$/.exec(response.headers.get("Content-Range") ?? "");
    if (range) return Number(range[1]);
    const length = response.headers.get("Content-Length");
    return response.status === 200 && length ? Number(length) : null;
  }

  /** Return at most n bytes of an answer, and stop reading there. */
  async function firstBytes(response, n) {
    const reader = response.body.getReader();
    const out = new Uint8Array(n);
    let at = 0;
    while (at < n) {
      const { done, value } = await reader.read();
      if (done) break;
      const part = value.subarray(0, n - at);
      out.set(part, at);
      at += part.length;
    }
    await reader.cancel();
    return out.subarray(0, at);
  }

  /** Return a source of an address; `size` is known after the first read. */
  function webSource(address) {
    const source = { name: address, size: null };
    source.read = async (offset, n) => {
      const headers = { Range: `bytes=${offset}-${offset + n - 1}` };
      let response;
      try {
        response = await fetch(address, { headers, credentials: "omit", referrerPolicy: "no-referrer" });
      } catch {
        throw new Refused("network", `${address} cannot be reached from this page`);
      }
      if (response.status === 401 || response.status === 404) {
        throw new Refused("not_found", `${address} does not exist or is private`);
      }
      if (!response.ok || (offset > 0 && response.status !== 206)) {
        throw new Refused("network", `${address} answered with status ${response.status}, without the range`);
      }
      source.size ??= statedSize(response);
      if (source.size === null) {
        throw new Refused("network", `${address} does not say how large the file is`);
      }
      return firstBytes(response, n);
    };
    return source;
  }

  Object.assign(sparsedelta, { addressOf, fileSource, webSource });
})();
