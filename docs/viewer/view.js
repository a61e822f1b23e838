// An inspection as elements of the page. Text from a file is only ever set as text, never as HTML.
"use strict";

(() => {
  const { byLayer, count, general, lossPoints, meanChanges, percent, printable, recordedScores, size } = sparsedelta;
  const MAX_ROWS = 200;
  const [MAX_LAYERS, MAX_KINDS] = [512, 96];
  const [STRONG, MIDDLE, EVEN] = [0.646, 0.3, 1.5]; // as in report/heat.py
  const [SHORT_ID, MAX_VALUE] = [12, 300];
  const DRAWN = ["losses", "mean_change", "evaluations"];
  const SVG = "http://www.w3.org/2000/svg";
  let number = 0; // of the last map

  function element(name, attributes, ...children) {
    const made = name === "svg" || attributes.svg ? document.createElementNS(SVG, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === "strength") made.style.setProperty("--s", value);
      else if (key !== "svg") made.setAttribute(key, value);
    }
    made.append(...children.filter((child) => child !== null));
    return made;
  }

  const heading = (text) => element("h2", {}, text);
  const paragraph = (text) => element("p", {}, text);
  const code = (text) => element("code", {}, printable(text));

  // ---- the cards

  function card(label, value, more, isLong = false) {
    const shown = element("dd", isLong ? { class: "long" } : {}, value);
    return element("div", {}, element("dt", {}, label), shown, element("dd", {}, ...[more].flat()));
  }

  function cards({ sizes, share, density, nnz, numel, states, n_tensors: n, base, target }) {
    const [name, revision] = (base.id ?? "not named").split(/@(.*)/s);
    const touched = Object.entries(states).filter(([, one]) => one).map(([state, one]) => `${count(one)} ${state}`);
    const at = revision ? ["at ", code(revision.slice(0, SHORT_ID)), ", "] : [];
    const fingerprint = target.fingerprint ? code(target.fingerprint.slice(0, SHORT_ID)) : "not known";
    return element(
      "dl", { class: "cards" },
      card("Size", size(sizes.file_bytes), `${share === null ? "" : `${percent(share)} of `}${size(target.tensor_bytes)} of tensors`),
      card("Changed", percent(density), `${count(nnz)} of ${count(numel)} elements`),
      card("Tensors", `${count(n - states.unchanged)} of ${count(n)}`, touched.join(", ")),
      card("Base", printable(name), [...at, "fingerprint ", code(base.fingerprint.slice(0, SHORT_ID))], true),
      card(
        "Verified when applied", target.fingerprint ? "every tensor" : "every changed value",
        ["target fingerprint ", fingerprint], true,
      ),
    );
  }

  // ---- the maps

  function scaleOf(values) {
    const known = values.filter((value) => value > 0);
    const low = known.reduce((a, b) => Math.min(a, b), Infinity);
    const high = known.reduce((a, b) => Math.max(a, b), 0);
    return { low, high, isEven: known.length > 0 && high < EVEN * low };
  }

  function strength(scale, value) {
    return scale.isEven ? MIDDLE : Math.sqrt(value / scale.high);
  }

  function legend(scale, shown) {
    if (scale.isEven) {
      const [low, high] = [shown(scale.low), shown(scale.high)];
      return paragraph(`About the same everywhere: ${low === high ? high : `${low} to ${high}`}.`);
    }
    const ends = [element("span", {}, "0"), element("i", {}), element("span", {}, shown(scale.high))];
    return element("p", { class: "scale" }, ...ends);
  }

  function heatCell(cell, tooltip, shown, depth) {
    const names = cell.names.slice(0, 3).map(printable).join(", ") + (cell.names.length > 3 ? ", …" : "");
    const title = `${names}: ${tooltip}`;
    const text = element("span", {}, shown);
    if (depth === null) return element("td", { class: "same", title }, text);
    const look = depth > STRONG ? { class: "strong" } : {};
    return element("td", { ...look, strength: depth.toFixed(3), title }, text);
  }

  function densityCell(cell, scale) {
    const tooltip = `${count(cell.nnz)} of ${count(cell.numel)} changed, ${percent(cell.density)}`;
    if (!cell.nnz) return heatCell(cell, tooltip, "–", null);
    return heatCell(cell, tooltip, percent(cell.density), strength(scale, cell.density));
  }

  function changeCell(cell, scale) {
    if (!cell.nnz) return heatCell(cell, "unchanged", "–", null);
    if (cell.change === null) return heatCell(cell, "not recorded", "?", null);
    const tooltip = `mean |change| ${general(cell.change, 3)} of ${count(cell.nnz)} changed`;
    return heatCell(cell, tooltip, general(cell.change, 2), strength(scale, cell.change));
  }

  function changedKinds(grid) {
    return grid.kinds.filter((kind) => [...grid.cells.get(kind).values()].some((cell) => cell.nnz));
  }

  function kindHeading(kind) {
    const parts = printable(kind).split(/(?<=\.)/).flatMap((part) => [part, element("wbr", {})]);
    return element("th", { scope: "row" }, element("span", {}, ...parts));
  }

  function zoom(stack, nLayers) {
    const chosen = nLayers <= 12 ? "numbers" : nLayers <= 32 ? "cells" : "small";
    const choices = [["small", "overview"], ["cells", "larger"], ["numbers", "with numbers"]];
    const labels = choices.map(([value, label]) => {
      const checked = value === chosen ? { checked: "" } : {};
      return element("label", {}, element("input", { type: "radio", name: `zoom-${number}`, value, ...checked }), label);
    });
    return element("fieldset", { class: "zoom" }, element("legend", {}, `Size of the map of ${stack}`), ...labels);
  }

  function heatMap(grid, render, scale) {
    const kinds = changedKinds(grid);
    if (!kinds.length) return null;
    number++;
    const stack = printable(grid.stack || "layers");
    const layers = grid.layers.slice(0, MAX_LAYERS);
    const columns = layers.map((layer) => {
      const between = layer.endsWith("0") ? {} : { class: "between" };
      return element("th", { scope: "col", ...between }, element("span", {}, layer));
    });
    const rows = kinds.slice(0, MAX_KINDS).map((kind) => {
      const cells = layers.map((layer) => {
        const cell = grid.cells.get(kind).get(layer);
        return cell ? render(cell, scale) : element("td", { class: "none" });
      });
      return element("tr", {}, kindHeading(kind), ...cells);
    });
    const head = element("tr", {}, element("td", { class: "none" }), ...columns);
    const table = element(
      "table", { class: "heat" }, element("caption", {}, `${stack}: tensors by layer`),
      element("thead", {}, head), element("tbody", {}, ...rows),
    );
    const left = [
      [kinds.length - MAX_KINDS, "kinds of tensors"], [grid.layers.length - MAX_LAYERS, "layers"],
    ].filter(([n]) => n > 0).map(([n, what]) => paragraph(`${count(n)} more ${what} are not drawn.`));
    const label = { "aria-label": `map of ${stack}, number ${number}` };
    const frame = element("div", { class: "wide", role: "region", tabindex: "0", ...label }, table);
    return element("div", { class: "map" }, zoom(stack, grid.layers.length), frame, ...left);
  }

  function maps(found) {
    if (!found.nnz) return [heading("Where it changes the model"), paragraph("No element changed.")];
    const { grids, single } = byLayer(found.tensors, meanChanges(found.info));
    const cells = grids.flatMap((grid) => [...grid.cells.values()].flatMap((own) => [...own.values()]));
    const density = scaleOf(cells.map((cell) => cell.density));
    const where = density.high ? [whereSection(grids, density)] : [];
    const change = changeSection(grids, cells);
    return [...(density.isEven ? [...change, ...where] : [...where, ...change]), ...singles(single)];
  }

  function whereSection(grids, scale) {
    const same = grids.flatMap((grid) => {
      const changed = new Set(changedKinds(grid));
      return grid.kinds.filter((kind) => !changed.has(kind)).map((kind) => printable(`${grid.stack}.*.${kind}`));
    });
    return element(
      "section", {}, heading("Where it changes the model"),
      paragraph("Share of the elements that changed, by kind of tensor and layer. Outlined cells are unchanged."),
      legend(scale, percent), ...grids.map((grid) => heatMap(grid, densityCell, scale)),
      same.length ? paragraph(`Unchanged in every layer: ${listed(same, 40)}.`) : null,
    );
  }

  function listed(names, limit) {
    const more = names.length > limit ? ` and ${count(names.length - limit)} more` : "";
    return names.slice(0, limit).join(", ") + more;
  }

  function changeSection(grids, cells) {
    const isKnown = (grid) => [...grid.cells.values()].some((own) => [...own.values()].some((cell) => cell.change !== null));
    const recorded = grids.filter(isKnown);
    if (!recorded.length) return [];
    const scale = scaleOf(cells.map((cell) => cell.change ?? 0));
    return [element(
      "section", { class: "change" }, heading("How much it changes the values"),
      paragraph("Mean |change| of the elements that changed, as recorded by the training."),
      legend(scale, (value) => general(value, 3)),
      ...recorded.map((grid) => heatMap(grid, changeCell, scale)),
    )];
  }

  // ---- tables

  /** Return the elements of a table; no other table of the page has this title. */
  function table(title, head, rows, nAll = rows.length, look = "") {
    const titles = head.map((one) => element("th", { scope: "col" }, one));
    const body = rows.map((row) => element("tr", {}, ...row.map((cell) => element("td", {}, cell))));
    const made = element(
      "table", { class: look }, element("thead", {}, element("tr", {}, ...titles)), element("tbody", {}, ...body),
    );
    const label = { "aria-label": `table: ${title}` };
    const frame = element("div", { class: "wide", role: "region", tabindex: "0", ...label }, made);
    const more = nAll > rows.length ? [paragraph(`${count(nAll - rows.length)} more are not listed.`)] : [];
    return [frame, ...more];
  }

  function titled(title, ...rest) {
    return [heading(title), ...table(title, ...rest)];
  }

  function singles(cells) {
    const changed = cells.filter((cell) => cell.nnz);
    if (!changed.length) return [];
    const rows = changed.slice(0, MAX_ROWS).map((cell) => [
      printable(cell.names[0]), count(cell.nnz), count(cell.numel), percent(cell.density),
      cell.change === null ? "?" : general(cell.change, 2),
    ]);
    const head = ["tensor", "changed", "of", "density", "mean |change|"];
    return titled("Outside the layers", head, rows, changed.length);
  }

  function files({ target }) {
    const rows = [
      ...target.weight_files.map((file) => [file.path, `${count(file.n_tensors)} tensors`, ""]),
      ...target.side_files.map((file) => [file.path, file.carried ? "in the delta" : "taken from the base", size(file.n_bytes)]),
      ...target.empty_folders.map((path) => [path, "empty folder", ""]),
    ];
    const shown = rows.slice(0, MAX_ROWS).map(([path, ...rest]) => [printable(path), ...rest]);
    return titled("Files of the target", ["file", "content", "size"], shown, rows.length, "texts");
  }

  function parts({ sizes }) {
    const rows = [
      ["positions of changes", sizes.index_bytes], ["values of changes", sizes.value_bytes],
      ["files", sizes.side_file_bytes], ["headers of weight files", sizes.stored_header_bytes],
      ["manifest", sizes.manifest_bytes], ["header", sizes.header_bytes], ["whole delta", sizes.file_bytes],
    ].filter(([, n]) => n).map(([what, n]) => [what, size(n), percent(n / sizes.file_bytes)]);
    return titled("What the bytes are", ["part", "size", "share"], rows);
  }

  function tensors(found) {
    const touched = found.tensors.filter((tensor) => tensor.state !== "unchanged");
    const box = element("input", { type: "search", id: "find", autocomplete: "off", spellcheck: "false" });
    const list = element("div", {});
    const show = () => {
      const chosen = touched.filter((tensor) => tensor.name.includes(box.value));
      const rows = chosen.slice(0, MAX_ROWS).map((tensor) => [
        printable(tensor.name), tensor.state, printable(tensor.dtype), tensor.shape.map(String).join(" × "),
        count(tensor.nnz), percent(tensor.density), size(tensor.payload_bytes),
      ]);
      const head = ["tensor", "state", "dtype", "shape", "changed", "density", "coded"];
      list.replaceChildren(...table("Tensors", head, rows, chosen.length, "texts"));
    };
    box.addEventListener("input", show);
    show();
    const label = element("label", { for: "find" }, "Names that contain ");
    return [
      heading("Tensors"),
      element("details", {}, element("summary", {}, `${count(touched.length)} touched`), element("p", {}, label, box), list),
    ];
  }

  // ---- how it was made

  function curve(points) {
    const [width, height, left, bottom, margin] = [720, 240, 56, 34, 12];
    const [steps, losses] = [points.map(([step]) => Math.trunc(step)), points.map(([, loss]) => loss)];
    const [begin, end] = [Math.min(...steps), Math.max(...steps)];
    const [low, high] = [Math.min(...losses, 0), Math.max(...losses)];
    const x = (step) => left + ((step - begin) / Math.max(end - begin, 1)) * (width - left - margin);
    const y = (loss) => margin + ((high - loss) / (high - low || 1)) * (height - bottom - margin);
    const made = element("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": "loss by step" });
    const text = (at, line, anchor, shown) =>
      element("text", { svg: true, x: at, y: line, "text-anchor": anchor }, shown);
    for (let i = 0; i < 5; i++) {
      const value = low + ((high - low) * i) / 4;
      const line = { x1: left, x2: width - margin, y1: y(value), y2: y(value) };
      made.append(element("line", { svg: true, class: "axis", ...line }));
      made.append(text(left - 8, y(value) + 4, "end", general(value, 3)));
    }
    const below = height - bottom + 18;
    made.append(text(left, below, "start", count(begin)), text(width - margin, below, "end", `step ${count(end)}`));
    const path = points.map(([step, loss]) => `${x(step).toFixed(1)},${y(loss).toFixed(1)}`).join(" ");
    made.append(element("polyline", { svg: true, class: "curve", points: path }));
    return made;
  }

  function loss({ info }) {
    const points = lossPoints(info);
    if (points.length < 2) return [];
    const [first, last] = [points[0], points.at(-1)];
    const caption = `From ${general(first[1], 4)} to ${general(last[1], 4)} in ${count(last[0])} steps.`;
    return [heading("Loss"), paragraph(caption), curve(points)];
  }

  function scores({ info }) {
    const found = recordedScores(info);
    if (!found) return [];
    const before = found.beforeStep === 0 ? "base" : `step ${count(found.beforeStep)}`;
    const short = (value) => general(value, 4);
    const rows = found.values.slice(0, MAX_ROWS).map(([name, old, now]) => [
      printable(name), short(old), short(now), `${now >= old ? "+" : ""}${general(now - old, 3)}`,
    ]);
    const head = ["score", before, `step ${count(found.afterStep)}`, "difference"];
    return titled("Evaluation", head, rows, found.values.length);
  }

  function settings({ info, base, target }) {
    const rows = [];
    const add = (name, value) => {
      if (rows.length >= MAX_ROWS) return;
      if (value instanceof Map && value.size) {
        for (const [inner, one] of value) add(name ? `${name}.${inner}` : inner, one);
      } else rows.push([printable(name), printable(shortText(value))]);
    };
    for (const [name, value] of info) if (!DRAWN.includes(name)) add(name, value);
    rows.push(["base fingerprint", code(base.fingerprint)], ["target fingerprint", code(target.fingerprint ?? "not known")]);
    const body = rows.map(([name, value]) =>
      element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, value)),
    );
    return [heading("How it was made"), element("table", { class: "facts" }, element("tbody", {}, ...body))];
  }

  function shortText(value) {
    const isPlain = typeof value !== "object" || value === null;
    const text = isPlain ? String(value) : sparsedelta.toJSON(value);
    return text.length > MAX_VALUE ? `${text.slice(0, MAX_VALUE)} …` : text;
  }

  /** Return the elements that show an inspection. */
  function view(name, found) {
    number = 0;
    return [
      element("h2", { class: "title", id: "shown", tabindex: "-1" }, printable(name)), cards(found), ...maps(found),
      ...loss(found), ...scores(found), ...files(found), ...parts(found), ...tensors(found), ...settings(found),
    ];
  }

  Object.assign(sparsedelta, { view });
})();
