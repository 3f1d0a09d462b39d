"use strict";
// The episode reader. Everything a model wrote enters the page as text nodes, never as markup.
(() => {
  const byId = (id) => document.getElementById(id);
  const element = (tag, className, ...children) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    made.append(...children.filter((child) => child !== null));
    return made;
  };
  const OUTCOMES = ["any", "correct", "wrong", "failed"];
  const FAILURES = Object.entries(DATA.labels.failures);  // of wrong episodes, chosen as wrong:<failure>
  const SIGNS = { correct: "●", wrong: "○", failed: "×" };
  const key = (question) => `${question.set}/${question.id}`;

  const favourites = ["kd", "dgpo"].filter((name) => MODELS.has(name));
  const state = {
    set: "", needle: "", current: null, listed: [],
    shown: new Set(favourites.length === 2 ? favourites : DATA.models.slice(-2).map((model) => model.name)),
    outcomes: new Map(DATA.models.map((model) => [model.name, "any"])),
  };
  const texts = new Map(DATA.questions.map((question) => [question, [
    question.id, question.question, ...question.golden,
    ...Object.values(question.episodes).flatMap((episode) => episode.segments.map(([, text]) => text)),
  ].join("\n").normalize("NFC").toLowerCase()]));

  function highlighted(written) {
    const text = written.normalize("NFC");  // a letter and its accent are found by the one key that types both
    const lower = text.toLowerCase();
    if (!state.needle || lower.length !== text.length) return [written];
    const parts = [];
    let end = 0;
    for (let at = lower.indexOf(state.needle); at >= 0; at = lower.indexOf(state.needle, end)) {
      parts.push(text.slice(end, at), element("mark", "", text.slice(at, at + state.needle.length)));
      end = at + state.needle.length;
    }
    return [...parts, text.slice(end)];
  }

  function passages(search) {
    const chips = search[1].map(([id, score]) => element("span", "", score === null ? id : `${id} · ${score}`));
    return element("div", "passages", ...(chips.length ? chips : ["no passage"]));
  }

  function segments(episode) {
    let answered = 0;
    return episode.segments.flatMap(([kind, text]) => {
      const block = element("div", `segment ${kind}`, ...highlighted(text));
      block.title = kind;
      const search = kind === "information" ? episode.searches[answered++] : undefined;
      return search ? [passages(search), block] : [block];
    });
  }

  function column(name, episode) {
    const model = MODELS.get(name);
    const facts = [
      "prediction: ", element("b", "", episode.prediction === null ? "none" : episode.prediction),
      ` · ended: ${episode.ending} · ${episode.searches.length} ${episode.searches.length === 1 ? "search" : "searches"}`,
      episode.hit ? " · hit" : " · no hit", episode.form ? "" : " · invalid format",
      episode.failure ? " · " : "", episode.failure ? element("bdi", "", episode.failure) : "",
      episode.first ? " · first failure: " : "", episode.first ? element("b", "", DATA.labels.failures[episode.first]) : "",
      ...episode.checks.map((check) => ` · check: ${DATA.labels.checks[check].toLowerCase()}`),
    ];
    return element("section", `card episode m${model.colour}`,
      element("header", "", element("span", "", model.label), element("span", episode.outcome, `${SIGNS[episode.outcome]} ${episode.outcome}`)),
      element("p", "facts", ...facts), ...segments(episode));
  }

  function showQuestion() {
    const question = state.current;
    const target = byId("reader-question");
    if (!question) { target.replaceChildren(element("p", "note", "No question fits this choice.")); return; }
    const golden = question.golden.flatMap((answer, at) => [at ? ", " : "", element("b", "", answer)]);
    const shown = DATA.models.filter((model) => state.shown.has(model.name));
    const columns = shown.map((model) => column(model.name, question.episodes[model.name]));
    const link = element("a", "", "link to this view");
    link.href = permalink();
    target.replaceChildren(
      element("h3", "", ...highlighted(question.question)),
      element("p", "facts", "golden: ", ...golden, ` · ${question.set} · ${question.id} · `, link),
      element("div", "columns", ...(columns.length ? columns : [element("p", "note", "Choose a model above.")])));
  }

  function hasOutcome(episode, wanted) {
    return wanted === "any" || wanted === episode.outcome || wanted === `wrong:${episode.first}`;
  }

  function showList() {
    const fits = (question) => (!state.set || question.set === state.set)
      && (!state.needle || texts.get(question).includes(state.needle))
      && DATA.models.every(({ name }) => hasOutcome(question.episodes[name], state.outcomes.get(name)));
    state.listed = DATA.questions.filter(fits);
    if (!state.listed.includes(state.current)) state.current = state.listed[0] || null;
    byId("reader-list").replaceChildren(...state.listed.map((question) => {
      const dots = DATA.models.map(({ name, label }) => {
        const { outcome, first } = question.episodes[name];
        const dot = element("span", outcome, SIGNS[outcome]);
        dot.title = `${label}: ${outcome}${first ? `, ${DATA.labels.failures[first].toLowerCase()}` : ""}`;
        return dot;
      });
      const button = element("button", "", element("span", "dots", ...dots), question.question);
      button.type = "button";
      button.addEventListener("click", () => go(question));
      return element("li", "", button);
    }));
    mark();
    showQuestion();
  }

  function mark() {
    const at = state.listed.indexOf(state.current);
    byId("reader-count").textContent = state.listed.length ? `${at + 1} of ${state.listed.length}` : "0";
    const list = byId("reader-list");
    [...list.children].forEach((item, index) => item.firstChild.setAttribute("aria-current", String(index === at)));
    const item = list.children[at];
    if (item) {  // scrolls the list alone, never the page
      if (item.offsetTop - list.offsetTop < list.scrollTop) list.scrollTop = item.offsetTop - list.offsetTop;
      const below = item.offsetTop - list.offsetTop + item.offsetHeight - list.clientHeight;
      if (below > list.scrollTop) list.scrollTop = below;
    }
  }

  function permalink() {
    const models = [...state.shown].map(encodeURIComponent).join(",");
    return `#episode=${encodeURIComponent(key(state.current))}&models=${models}`;
  }

  function remember() {
    if (state.current) history.replaceState(null, "", permalink());
  }

  function go(question) {
    state.current = question;
    mark();
    showQuestion();
    remember();
  }

  function step(by) {
    const next = state.listed[state.listed.indexOf(state.current) + by];
    if (next) go(next);
  }

  function followHash() {
    if (!location.hash.startsWith("#episode=")) return;
    const wanted = new URLSearchParams(location.hash.slice(1));
    const question = DATA.questions.find((each) => key(each) === wanted.get("episode"));
    if (!question) return;
    const models = (wanted.get("models") || "").split(",").filter((name) => MODELS.has(name));
    if (models.length) state.shown = new Set(models);
    state.set = state.needle = byId("reader-set").value = byId("reader-search").value = "";
    for (const name of state.outcomes.keys()) state.outcomes.set(name, "any");
    state.current = question;
    choices();
    showList();
    byId("reader").scrollIntoView();
  }

  function choices() {
    byId("reader-models").replaceChildren(...DATA.models.map(({ name, label, colour }) => {
      const box = element("input");
      box.type = "checkbox";
      box.checked = state.shown.has(name);
      box.addEventListener("change", () => {
        state.shown[box.checked ? "add" : "delete"](name);
        choices();
        showQuestion();
        remember();
      });
      const outcome = element("select", "", ...OUTCOMES.map((each) => new Option(each, each)));
      const reasons = element("optgroup", "", ...FAILURES.map(([failure, title]) => new Option(title.toLowerCase(), `wrong:${failure}`)));
      reasons.label = "wrong, first failure";
      outcome.append(reasons);
      outcome.setAttribute("aria-label", `Outcome of ${label}`);
      outcome.value = state.outcomes.get(name);
      outcome.addEventListener("change", () => { state.outcomes.set(name, outcome.value); showList(); remember(); });
      return element("span", `choice m${colour}${box.checked ? " on" : ""}`, element("label", "", box, label), outcome);
    }));
  }

  byId("reader-set").append(new Option("all", ""), ...DATA.sets.map((name) => new Option(name, name)));
  byId("reader-set").addEventListener("change", (event) => { state.set = event.target.value; showList(); remember(); });
  byId("reader-search").addEventListener("input", (event) => { state.needle = event.target.value.trim().normalize("NFC").toLowerCase(); showList(); });
  byId("reader-previous").addEventListener("click", () => step(-1));
  byId("reader-next").addEventListener("click", () => step(1));
  addEventListener("hashchange", followHash);
  addEventListener("keydown", (event) => {
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) || event.altKey || event.ctrlKey || event.metaKey) return;
    const box = byId("reader").getBoundingClientRect();
    if (box.top > innerHeight || box.bottom < 0) return;  // the arrows belong to the reader while it is in sight
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  choices();
  showList();
  followHash();
})();
