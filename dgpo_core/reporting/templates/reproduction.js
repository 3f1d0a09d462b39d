"use strict";
// Which recipes the curves show: the paper's figures at first, any other on demand.
(() => {
  const boxes = [...document.querySelectorAll("#recipes input")];
  const show = (chosen) => {
    for (const box of boxes) {
      box.checked = chosen(box.value);
      if (box.checked) HIDDEN.delete(box.value); else HIDDEN.add(box.value);
    }
    document.dispatchEvent(new Event("models"));
  };
  const figures = new Set(DATA.figures);
  const checked = () => new Set(boxes.filter((box) => box.checked).map((box) => box.value));
  for (const box of boxes) box.addEventListener("change", () => { const now = checked(); show((name) => now.has(name)); });
  document.getElementById("recipes-figures")?.addEventListener("click", () => show((name) => figures.has(name)));
  document.getElementById("recipes-all")?.addEventListener("click", () => show(() => true));
  if (figures.size) show((name) => figures.has(name));
})();
