"use strict";
/* Shows the values of the curves under the pointer, and smooths noisy curves. Without it, the page has the same charts. */
(() => {
  const formats = {
    number: (value) => (Math.abs(value) >= 1000 && Math.abs(value) < 1e6 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)))),
    percent: (value) => `${Number((100 * value).toPrecision(3))}%`,
    count: (value) => Math.round(value).toLocaleString("en"),
  };
  const slider = document.querySelector("#smoothing input");

  /* The running mean over so many percent of the values, as on the page without this script. */
  const smooth = (values, percent) => {
    const half = percent ? Math.floor((values.length * percent) / 200) + 2 : 0;
    const sums = [0];
    for (const value of values) sums.push(sums[sums.length - 1] + value);
    return values.map((_, index) => {
      const from = Math.max(0, index - half), to = Math.min(values.length, index + half + 1);
      return (sums[to] - sums[from]) / (to - from);
    });
  };

  /* The pixel of a step and a value. */
  const place = (plot, step, value) => {
    const [left, right, top, bottom, last, low, high, log] = plot.frame;
    const scale = log ? Math.log : (number) => number;
    const share = (scale(value) - scale(low)) / (scale(high) - scale(low));
    return [left + (step / last) * (right - left), bottom + share * (top - bottom)];
  };

  const nearest = (steps, step) => {
    let best = 0;
    steps.forEach((other, index) => { if (Math.abs(other - step) < Math.abs(steps[best] - step)) best = index; });
    return best;
  };

  const add = (parent, name, attributes) => {
    const element = parent.appendChild(document.createElementNS(parent.namespaceURI, name));
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };

  const hide = (plot) => { plot.marks.replaceChildren(); plot.tip.hidden = true; };

  const show = (chart, plot, event) => {
    const box = plot.svg.getBoundingClientRect(), width = plot.svg.viewBox.baseVal.width;
    const [left, right, top, bottom, last] = plot.frame;
    const step = (((event.clientX - box.left) * width / box.width - left) / (right - left)) * last;
    const close = (one, other) => Math.abs(one - other) * (right - left) / last < 6;
    const steps = chart.curves.map((curve) => curve.steps[nearest(curve.steps, step)]);
    /* of the curves that are close, the one with the fewest points: the others are close in any case */
    const order = chart.curves.map((_, index) => index).sort((a, b) => chart.curves[a].steps.length - chart.curves[b].steps.length);
    const at = steps[order.find((index) => close(steps[index], step)) ?? order[order.length - 1]];
    const lines = [`step ${at.toLocaleString("en")}`];
    plot.marks.replaceChildren();
    const [x] = place(plot, at, 1);
    add(plot.marks, "line", { x1: x, x2: x, y1: top, y2: bottom, class: "cursor" });
    for (const curve of chart.curves) {
      const index = nearest(curve.steps, at);
      if (!close(curve.steps[index], at)) continue;
      const text = formats[chart.format], value = curve.values[index];
      const shown = curve.smoothed ? curve.smoothed[index] : value;
      const [cx, cy] = place(plot, curve.steps[index], shown);
      add(plot.marks, "circle", { cx, cy, r: 4, style: `fill: var(--${curve.color})` });
      lines.push(`${curve.name} ${text(value)}` + (curve.smoothed ? ` (mean ${text(shown)})` : "") +
        (curve.steps[index] === at ? "" : ` at step ${curve.steps[index].toLocaleString("en")}`));
    }
    plot.tip.textContent = lines.join("\n");
    plot.tip.hidden = false;
    const pixel = (x / width) * box.width, room = box.width - plot.tip.offsetWidth;
    plot.tip.style.left = `${Math.max(0, Math.min(room, pixel > box.width / 2 ? pixel - plot.tip.offsetWidth - 12 : pixel + 12))}px`;
  };

  /* Redraws the running means of a chart. */
  const redraw = (chart, percent) => {
    const noisy = chart.noisy;
    if (!noisy) return;
    noisy.smoothed = smooth(noisy.means || noisy.values, percent);
    for (const plot of chart.plots) {
      const points = noisy.smoothed.map((value, index) => place(plot, noisy.steps[index], value).map((x) => x.toFixed(2)).join(" "));
      plot.svg.querySelector(".mean path").setAttribute("d", `M ${points.join(" L ")}`);
      hide(plot);
    }
  };

  const charts = [...document.querySelectorAll("figure[data-curves]")].map((figure) => {
    const chart = JSON.parse(figure.dataset.curves);
    chart.plots = [...figure.querySelectorAll(".plot")].map((element) => {
      const svg = element.querySelector("svg"), tip = document.createElement("div");
      tip.className = "tip";
      tip.hidden = true;
      element.append(tip);
      const plot = { svg, tip, frame: JSON.parse(element.dataset.frame), marks: add(svg, "g", { class: "marks" }) };
      svg.addEventListener("pointermove", (event) => show(chart, plot, event));
      svg.addEventListener("pointerdown", (event) => show(chart, plot, event));
      svg.addEventListener("pointerleave", () => hide(plot));
      return plot;
    });
    chart.noisy = chart.curves.find((curve) => curve.noisy);
    if (chart.noisy) chart.noisy.smoothed = smooth(chart.noisy.means || chart.noisy.values, Number(slider.value));
    return chart;
  });
  if (charts.some((chart) => chart.noisy)) {
    slider.closest("label").hidden = false;
    slider.addEventListener("input", () => {
      slider.nextElementSibling.textContent = Number(slider.value) ? `${slider.value}% of the run` : "off";
      for (const chart of charts) redraw(chart, Number(slider.value));
    });
  }
})();
