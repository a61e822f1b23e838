// Read deltas with the viewer of docs/viewer under node.
//
//     node vectors.mjs                     check every vector as far as header and manifest decide it
//     node vectors.mjs --json FILE ...     print one line for each file: its inspection, or {"code", "message"}
//     node vectors.mjs --frames FILE       check that frames have contents with these hashes
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const require = createRequire(import.meta.url);
const viewer = new URL("../../docs/viewer/", import.meta.url);
const vectors = new URL("../../spec/vectors/", import.meta.url);
for (const name of ["errors", "blake3", "zstd", "json", "paths", "format", "inspect"]) {
  require(new URL(`${name}.js`, viewer).pathname);
}
const { Refused, blake3, decompress, hex, inspect, toJSON } = globalThis.sparsedelta;

/** Return a source of bytes in memory. */
function memory(data) {
  return { size: data.length, read: async (at, n) => new Uint8Array(data.subarray(at, at + n)) };
}

async function read(path) {
  try {
    return await inspect(memory(readFileSync(path)));
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    return { code: error.code, message: error.message };
  }
}

// The rules that the payload or the base decides; header and manifest alone say nothing about them.
const LATER = ["apply_", "digest_", "index_", "values_", "header_", "frame_"];

async function checkVectors() {
  const { valid, invalid } = JSON.parse(readFileSync(new URL("manifest.json", vectors)));
  let failed = 0;
  const report = (name, allowed, found = "accepted") => {
    if (allowed.includes(found)) return;
    failed++;
    console.log(`${name}: expected ${allowed.join(" or ")}, found ${found}`);
  };
  for (const { name, delta } of valid) {
    report(name, ["accepted"], (await read(new URL(delta, vectors))).code);
  }
  let refused = 0;
  for (const { name, code, also = [], delta } of invalid) {
    const found = (await read(new URL(delta, vectors))).code;
    if (found) refused++;
    const isDecided = found || !LATER.some((prefix) => name.startsWith(prefix));
    if (isDecided) report(name, [code, ...also], found);
  }
  console.log(`${valid.length} valid vectors; ${refused} of ${invalid.length} invalid vectors refused; ${failed} wrong`);
  return failed === 0;
}

function checkFrames(path) {
  const cases = JSON.parse(readFileSync(path));
  const isRight = ({ frame, raw, hash }) =>
    hex(blake3(decompress(new Uint8Array(Buffer.from(frame, "hex")), raw))) === hash;
  console.log(`${cases.filter(isRight).length} right`);
}

if (process.argv[2] === "--frames") {
  checkFrames(process.argv[3]);
} else if (process.argv[2] === "--json") {
  for (const path of process.argv.slice(3)) console.log(toJSON(await read(path)));
} else {
  process.exitCode = (await checkVectors()) ? 0 : 1;
}
