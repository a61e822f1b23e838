// The tensors of an inspection by layer and kind, as for the maps of `inspect --html`.
"use strict";

(() => {
  const NUMBER = /(?<=\.)[0-9]+(?=\.|$)/;
  const NUMBERS = new RegExp(NUMBER, "g");

  function trimmed(text, pattern) {
    return text.replace(pattern, "");
  }

  /** Return `[stack, layer, kind]` of a tensor's name, or null if the name has no number. */
  function placeOf(name) {
    const found = NUMBER.exec(name);
    if (!found) return null;
    const rest = name.slice(found.index + found[0].length);
    const kind = trimmed(rest, /^\.+/).replace(NUMBERS, "*") || "(itself)";
    return [trimmed(name.slice(0, found.index), /\.+$/), String(BigInt(found[0])), kind];
  }

  /**
   * Return `{grids, single}`: one grid for each stack of layers, and the tensors without a number.
   *
   * A grid has `stack`, `layers` (ascending), `kinds`, and `cells`: for each kind a Map from layer to
   * `{names, nnz, numel, change}`; change is the mean |change|, or null where it is not known.
   */
  function byLayer(tensors, changes) {
    const stacks = new Map();
    const single = [];
    for (const tensor of tensors) {
      const place = placeOf(tensor.name);
      if (!place) {
        single.push(summedCell([tensor], changes));
        continue;
      }
      const [stack, layer, kind] = place;
      const kinds = stacks.get(stack) ?? stacks.set(stack, new Map()).get(stack);
      const layers = kinds.get(kind) ?? kinds.set(kind, new Map()).get(kind);
      const own = layers.get(layer) ?? layers.set(layer, []).get(layer);
      own.push(tensor);
    }
    const grids = [...stacks].map(([stack, kinds]) => {
      const cells = new Map();
      const layers = new Set();
      for (const [kind, own] of kinds) {
        cells.set(kind, new Map([...own].map(([layer, found]) => [layer, summedCell(found, changes)])));
        for (const layer of own.keys()) layers.add(layer);
      }
      const ascending = [...layers].sort((a, b) => (BigInt(a) < BigInt(b) ? -1 : 1));
      return { stack, layers: ascending, kinds: [...kinds.keys()], cells };
    });
    return { grids, single };
  }

  function newCell() {
    return { names: [], nnz: 0, numel: 0, change: null };
  }

  function summedCell(tensors, changes) {
    const cell = newCell();
    let known = true;
    let weighted = 0;
    for (const { name, nnz, numel } of tensors) {
      cell.names.push(name);
      cell.nnz += nnz;
      cell.numel += Number(numel);
      if (!nnz) continue;
      known &&= changes.has(name);
      weighted += (changes.get(name) ?? 0) * nnz;
    }
    cell.density = cell.numel ? cell.nnz / cell.numel : 0;
    if (cell.nnz && known) cell.change = weighted / cell.nnz;
    return cell;
  }

  function isNumber(value) {
    return typeof value === "number" && Math.abs(value) < 1e15;
  }

  /** Return the mean |change| by tensor that the training recorded, as a Map. */
  function meanChanges(info) {
    const found = info.get("mean_change");
    const entries = found instanceof Map ? [...found] : [];
    return new Map(entries.filter(([, value]) => isNumber(value) && value >= 0));
  }

  /** Return the `[step, loss]` pairs that the training recorded; empty if they have another form. */
  function lossPoints(info) {
    const found = info.get("losses");
    const isPoint = (one) => Array.isArray(one) && one.length === 2 && one.every(isNumber);
    return Array.isArray(found) && found.every(isPoint) ? found : [];
  }

  /** Return `{beforeStep, afterStep, values}` of the first and the last evaluation, or null. */
  function recordedScores(info) {
    const found = info.get("evaluations");
    if (!Array.isArray(found) || found.length < 2) return null;
    const [before, after] = [evaluation(found[0]), evaluation(found.at(-1))];
    const values = [...before.values].filter(([name]) => after.values.has(name));
    if (!values.length || before.step >= after.step) return null;
    return {
      beforeStep: before.step,
      afterStep: after.step,
      values: values.map(([name, value]) => [name, value, after.values.get(name)]),
    };
  }

  function evaluation(entry) {
    const [step, values] = entry instanceof Map ? [entry.get("step"), entry.get("values")] : [];
    if (!Number.isInteger(step) || !(values instanceof Map)) return { step: 0, values: new Map() };
    return { step, values: new Map([...values].filter(([, value]) => isNumber(value))) };
  }

  Object.assign(sparsedelta, { byLayer, lossPoints, meanChanges, recordedScores });
})();
