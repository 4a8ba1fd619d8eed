// Draws the charts of a report, and smooths those that ask for it.
"use strict";
const items = JSON.parse(document.getElementById("charts").textContent);
const drawn = items.map((item) => Bokeh.embed.embed_item(item));
const slider = document.getElementById("smoothing");

// An exponential moving average without the bias of its first values.
function smooth(values, weight) {
  let sum = 0;
  let total = 0;
  return values.map((value) => {
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}

slider?.addEventListener("input", async () => {
  const weight = Number(slider.value);
  document.getElementById("smoothed").textContent = weight ? weight.toFixed(2) : "off";
  for (const views of await Promise.all(drawn)) {
    for (const root of views.roots) {
      for (const source of root.model.select({ type: "ColumnDataSource" })) {
        if (!source.name) continue;
        const raw = Array.from(source.data.raw);
        source.data = { ...source.data, y: smooth(raw, weight) };
      }
    }
  }
});
