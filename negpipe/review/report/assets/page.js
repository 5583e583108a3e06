"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const boxes = [...document.querySelectorAll(".negative input")];
  if (!boxes.length) return;

  // A pair as a line of the file. Ids stand in attributes as JSON, so that every character survives.
  const pair = (anchor, negative) => JSON.stringify({ anchor_id: anchor, document_id: negative });
  const line = new Map(
    boxes.map((box) => [box, pair(JSON.parse(box.dataset.anchor), JSON.parse(box.dataset.document))])
  );
  const earlier = JSON.parse(byId("earlier").textContent).map(([anchor, negative]) => pair(anchor, negative));
  const memory = `negpipe ${document.documentElement.dataset.key}`;

  const share = (some) => {
    const marked = some.filter((box) => box.checked).length;
    return `${marked} of ${some.length}`;
  };

  function show() {
    const drawn = boxes.filter((box) => box.hasAttribute("data-random"));
    byId("marked").textContent = `${share(boxes)} negatives marked, ${share(drawn)} of anchors drawn at random.`;
  }

  // Some browsers keep nothing for a local file: marks then live as long as the page.
  function remember() {
    try {
      localStorage.setItem(memory, JSON.stringify(boxes.filter((box) => box.checked).map((box) => line.get(box))));
    } catch {}
  }

  function recall() {
    try {
      const marked = new Set(JSON.parse(localStorage.getItem(memory) ?? "[]"));
      for (const box of boxes) box.checked = marked.has(line.get(box));
    } catch {}
  }

  function save() {
    const marked = boxes.filter((box) => box.checked).map((box) => line.get(box));
    const lines = [...new Set([...earlier, ...marked])];
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(lines.map((one) => one + "\n"), { type: "application/x-ndjson" }));
    link.download = "verdicts.jsonl";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    byId("saved").textContent = `Saved ${lines.length} pair${lines.length === 1 ? "" : "s"} as verdicts.jsonl, in the download folder.`;
  }

  const current = () => document.activeElement?.closest(".negative")?.querySelector("input");

  function move(step) {
    const at = boxes.indexOf(current());
    const box = boxes[at < 0 ? 0 : Math.min(Math.max(at + step, 0), boxes.length - 1)];
    box.focus({ preventScroll: true });
    box.closest(".negative").scrollIntoView({ block: "center" });
  }

  function whole() {
    const pressed = document.body.classList.toggle("whole");
    byId("whole").setAttribute("aria-pressed", pressed);
  }

  const keys = {
    j: () => move(1),
    k: () => move(-1),
    x: () => (current() ?? boxes[0]).click(),
    s: save,
    e: whole,
    "?": () => byId("help").showModal(),
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open || !keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });
  document.addEventListener("change", () => {
    show();
    remember();
  });
  byId("save").addEventListener("click", save);
  byId("whole").addEventListener("click", whole);
  byId("keys").addEventListener("click", keys["?"]);
  byId("close").addEventListener("click", () => byId("help").close());
  recall();
  show();
})();
