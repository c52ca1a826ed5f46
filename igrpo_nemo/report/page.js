"use strict";
// Value readout: the nearest point of each line to the pointer, written under the chart.
const NS = "http://www.w3.org/2000/svg";
const write = (v, percent) => percent ? `${+(100 * v).toPrecision(3)} %` : `${+v.toPrecision(4)}`;
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const chart = JSON.parse(svg.dataset.chart), [low, high] = chart.x, [left, right, top, bottom] = chart.box;
  const readout = svg.parentElement.querySelector(".readout");
  const cursor = document.createElementNS(NS, "path");
  cursor.setAttribute("class", "cursor");
  svg.append(cursor);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const part = (Math.min(Math.max(at, left), right) - left) / (right - left);
    const x = chart.log ? low * (high / low) ** part : low + part * (high - low);
    readout.replaceChildren();
    let step = null;
    for (const line of chart.lines) {
      let best = 0;
      line.x.forEach((value, i) => { if (Math.abs(value - x) < Math.abs(line.x[best] - x)) best = i; });
      step ??= line.x[best];
      const value = document.createElement("b");
      value.style.setProperty("--c", `var(--${line.color})`);
      value.textContent = ` ${write(line.y[best], chart.percent)}`;
      readout.append(readout.childNodes.length ? " · " : "", line.label, value);
    }
    readout.prepend(`${chart.name ?? "step"} ${Math.round(step)}: `);
    const where = chart.log ? Math.log(step / low) / Math.log(high / low) : (step - low) / (high - low);
    const px = left + where * (right - left);
    cursor.setAttribute("d", `M${px} ${top}V${bottom}`);
  });
  svg.addEventListener("pointerleave", () => { readout.replaceChildren(); cursor.removeAttribute("d"); });
}
// Samples in pages; without scripts they are all listed.
for (const list of document.querySelectorAll(".samples")) {
  const items = [...list.children], size = +list.dataset.pageSize, pages = Math.ceil(items.length / size);
  if (pages < 2) continue;
  const bar = document.createElement("div"), where = document.createElement("span");
  const [back, next] = ["Earlier", "Later"].map((text) => {
    const button = document.createElement("button");
    button.textContent = text;
    return button;
  });
  let page = pages - 1;
  const show = () => {
    items.forEach((item, i) => { item.hidden = Math.floor(i / size) !== page; });
    where.textContent = `page ${page + 1} of ${pages}`;
    back.disabled = page === 0;
    next.disabled = page === pages - 1;
  };
  back.addEventListener("click", () => { page -= 1; show(); });
  next.addEventListener("click", () => { page += 1; show(); });
  bar.className = "pager";
  bar.append(back, where, next);
  list.after(bar);
  show();
}
