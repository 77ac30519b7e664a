// Runs before the page is drawn, so that a dark page is never light for a moment.
"use strict";
(() => {
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try { chosen = localStorage.getItem("llmops.theme"); } catch { /* storage is switched off: as the system */ }
  const apply = () => {
    const dark = chosen === "dark" || (chosen !== "light" && system.matches);
    document.documentElement.dataset.theme = dark ? "dark" : "light";
  };
  system.addEventListener("change", apply);
  apply();
  globalThis.llmopsTheme = {
    get chosen() { return chosen ?? "system"; },
    choose(theme) {
      chosen = theme === "system" ? null : theme;
      try {
        if (chosen) localStorage.setItem("llmops.theme", chosen);
        else localStorage.removeItem("llmops.theme");
      } catch { /* it lasts as long as the page */ }
      apply();
    },
  };
})();
