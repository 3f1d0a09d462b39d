"use strict";
// Light, dark, or as the system. Dispatches "theme" on the document after a change.
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const themes = ["auto", "light", "dark"];
  let theme = "auto";
  try { theme = localStorage.getItem("dgpo-theme") || "auto"; } catch { /* storage may be forbidden */ }

  function apply() {
    root.dataset.theme = theme;
    root.classList.toggle("dark", theme === "dark" || (theme === "auto" && system.matches));
    button.textContent = `Theme: ${theme}`;
    document.dispatchEvent(new Event("theme"));
  }

  button.addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    try { localStorage.setItem("dgpo-theme", theme); } catch { /* then it is not remembered */ }
    apply();
  });
  system.addEventListener("change", apply);
  // paper is light, and as wide as `.printing` says; charts are drawn for it by their own listener
  addEventListener("beforeprint", () => {
    root.classList.remove("dark");
    root.classList.add("printing");
  });
  addEventListener("afterprint", () => { root.classList.remove("printing"); apply(); });
  apply();
})();
