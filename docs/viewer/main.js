// The page: opens a file or an address, and shows its inspection or why it was refused.
"use strict";

(() => {
  const { Refused, addressOf, fileSource, inspect, printable, toJSON, view, webSource } = sparsedelta;
  const at = (id) => document.getElementById(id);
  let latest = 0; // number of the request that was made last

  function say(text, isError = false) {
    at("status").textContent = text;
    at("status").className = isError ? "error" : "";
  }

  async function show(makeSource) {
    const request = ++latest;
    at("result").replaceChildren();
    at("save").hidden = true;
    say("Reading …");
    try {
      const source = makeSource();
      const found = await inspect(source);
      if (request !== latest) return;
      at("result").replaceChildren(...view(source.name, found));
      say("");
      offer(source.name, found);
      at("shown").focus();
    } catch (error) {
      if (request !== latest) return;
      const isExpected = error instanceof Refused;
      say(isExpected ? `Refused (${error.code}): ${printable(error.message)}.` : `This page failed: ${error}`, true);
      if (!isExpected) throw error;
    }
  }

  /** Offer the inspection as the JSON of `sparsedelta inspect --json`. */
  function offer(name, found) {
    at("save").hidden = false;
    at("save").onclick = () => {
      const text = toJSON({ delta: name, ...found });
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
      link.download = "inspection.json";
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    };
  }

  function openFile(file) {
    if (file) show(() => fileSource(file));
  }

  function openAddress(text) {
    at("address").value = text;
    show(() => webSource(addressOf(text)));
  }

  function openHash() {
    const text = decodeURIComponent(location.hash.slice(1));
    if (text) openAddress(text);
  }

  at("file").addEventListener("change", () => openFile(at("file").files[0]));
  at("open").addEventListener("submit", (event) => {
    event.preventDefault();
    openAddress(at("address").value);
  });
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    openFile(event.dataTransfer.files[0]);
  });
  addEventListener("hashchange", openHash);
  openHash();
})();
