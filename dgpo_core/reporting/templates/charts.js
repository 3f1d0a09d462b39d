"use strict";
// The page's data and charts. Colours live in the style sheet; charts read them and are redrawn on a change.
const DATA = JSON.parse(document.getElementById("data").textContent);
const MODELS = new Map(DATA.models.map((model) => [model.name, model]));
const HIDDEN = new Set();  // models whose traces are switched off; dispatch "models" on the document after a change

(() => {
  const root = document.documentElement;
  const drawn = new Set();

  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const modelColour = (name) => colour(`--m${MODELS.has(name) ? MODELS.get(name).colour : 2}`);
  const faint = (hex, alpha) => `rgba(${[1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)).join(",")},${alpha})`;

  function layout(extra) {
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 11, color: colour("--soft") },
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
      ...extra,
    };
  }

  function curve(chart) {
    const own = (trace) => "colour" in trace ? colour(`--m${trace.colour}`) : modelColour(trace.model || chart.model);
    const traces = chart.traces.filter((trace) => !HIDDEN.has(trace.model)).map((trace) => ({
      type: "scatter", name: trace.name, x: trace.x, y: trace.y,
      mode: trace.role === "points" || trace.role === "looks" ? "lines+markers" : "lines",
      line: trace.role === "points" ? { color: colour("--m1"), width: 1.5, dash: "dot" }
        : { color: trace.role === "raw" ? faint(own(trace), 0.3) : own(trace), width: trace.role === "raw" ? 1 : 2 },
      marker: { color: trace.role === "looks" ? own(trace) : colour("--m1"), size: 7 },
      hoverinfo: trace.role === "raw" ? "skip" : "x+y+name",
      showlegend: trace.role !== "raw",
    }));
    const axis = { gridcolor: colour("--line"), zeroline: false, automargin: true, nticks: 5, exponentformat: "none", linecolor: colour("--line") };
    const names = new Set(chart.traces.map((trace) => trace.name));
    const negative = traces.some((trace) => trace.y.some((value) => value < 0));
    return [traces, layout({
      margin: { l: 38, r: 8, t: 10, b: 26 }, hovermode: "x unified",
      xaxis: { ...axis, showgrid: false, ...(chart.log && { type: "log" }) },
      // models are compared on one scale; what is never negative, such as a share that stays 0, gets no negative axis
      yaxis: { ...axis, rangemode: chart.traces[0].model ? "tozero" : negative ? "normal" : "nonnegative" },
      showlegend: names.size > 1 && !chart.traces[0].model, legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
    })];
  }

  // a radar's labels need more room than a phone has: there its axes are lines, one below the other
  const narrow = matchMedia("(max-width: 600px)");

  function dots(chart) {
    const labels = chart.axes.map((axis) => axis.replace("<br>", ", "));
    const traces = chart.lines.map((line) => ({
      type: "scatter", mode: "markers", name: MODELS.get(line.model).label, x: line.values, y: labels,
      marker: { color: modelColour(line.model), size: 11 }, hovertemplate: "%{x:.3f}",
    }));
    const axis = { gridcolor: colour("--line"), linecolor: colour("--line"), fixedrange: true };
    return [traces, layout({
      margin: { l: 8, r: 12, t: 46, b: 30 }, legend: { orientation: "h", xref: "container", yref: "container", x: 0, y: 1, yanchor: "top" },
      xaxis: { ...axis, range: [-0.03, 1.03], zeroline: false },
      yaxis: { ...axis, autorange: "reversed", automargin: true },
    })];
  }

  function radar(chart) {
    if (narrow.matches) return dots(chart);
    const close = (values) => [...values, values[0]];
    const traces = chart.lines.map((line) => {
      const own = modelColour(line.model);
      return {
        type: "scatterpolar", name: MODELS.get(line.model).label, r: close(line.values), theta: close(chart.axes),
        mode: "lines+markers", fill: "toself", fillcolor: faint(own, 0.1), line: { color: own, width: 2 }, marker: { size: 5 },
        hovertemplate: "%{theta}: %{r:.3f}",
      };
    });
    const axis = { gridcolor: colour("--line"), linecolor: colour("--line") };
    return [traces, layout({
      margin: { l: 120, r: 120, t: 50, b: 60 }, legend: { orientation: "h", x: 0.5, xanchor: "center", y: -0.2 },
      polar: {
        bgcolor: "rgba(0,0,0,0)", angularaxis: { ...axis, rotation: 90, direction: "clockwise" },
        // its labels stand between two axes, where no line has its corner
        radialaxis: { ...axis, range: [0, 1], tickvals: [0.25, 0.5, 0.75, 1], angle: 90 - 180 / chart.axes.length, tickangle: 0 },
      },
    })];
  }

  function draw(id) {
    drawn.add(id);
    const [traces, shape] = id in DATA.charts ? curve(DATA.charts[id]) : radar(DATA.radars[id]);
    const settings = { displayModeBar: false };
    const place = document.getElementById(id);
    Object.assign(shape, { width: place.clientWidth, height: place.clientHeight });
    // a radar and its lines are other subplots, which one does not become the other by `react`
    if (id in DATA.radars) Plotly.newPlot(id, traces, shape, settings);
    else Plotly.react(id, traces, shape, settings);
  }

  // drawn when they come near the screen (dozens at once would make the page slow to open), and all others, for
  // pictures of the whole page, when there is nothing else to do; those in a closed fold when it is opened
  const charts = [...document.querySelectorAll(".chart")];
  const folded = (chart) => chart.closest("details:not([open])");
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) { watch.unobserve(entry.target); draw(entry.target.id); }
    }
  }, { rootMargin: "600px" });
  const idle = globalThis.requestIdleCallback || ((work) => setTimeout(work, 50));
  function drawNext() {
    const chart = charts.find((each) => !drawn.has(each.id) && !folded(each));
    if (chart) { watch.unobserve(chart); draw(chart.id); idle(drawNext); }
  }
  const redraw = () => drawn.forEach(draw);
  for (const change of ["models", "theme"]) document.addEventListener(change, redraw);
  narrow.addEventListener("change", redraw);
  addEventListener("beforeprint", () => charts.filter((each) => !folded(each)).forEach((each) => draw(each.id)));
  const sized = new ResizeObserver((entries) => {
    for (const { target } of entries) if (drawn.has(target.id) && target.clientWidth) draw(target.id);
  });
  for (const chart of charts) { watch.observe(chart); sized.observe(chart); }
  addEventListener("load", () => idle(drawNext));
  document.addEventListener("toggle", () => idle(drawNext), true);  // it does not bubble
})();
