// A parity plot on a canvas: elements can be switched off, and a click or tap names the nearest point.
for (const root of document.querySelectorAll(".plot[data-parity]")) {
  const data = JSON.parse(root.querySelector("script[type='application/json']").textContent);
  const canvas = root.querySelector("canvas"), out = root.querySelector("output");
  const size = 520, pad = 56, hidden = new Set();
  const ratio = window.devicePixelRatio || 1;
  canvas.width = canvas.height = size * ratio;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const limit = data.limit, span = size - 2 * pad;
  const px = v => pad + (v + limit) / (2 * limit) * span, py = v => size - px(v);
  let marked = null;

  function draw() {
    pen.clearRect(0, 0, size, size);
    pen.font = "12px system-ui,sans-serif";
    pen.strokeStyle = "#888";
    pen.strokeRect(pad, pad, span, span);
    pen.beginPath(); pen.moveTo(pad, size - pad); pen.lineTo(size - pad, pad); pen.stroke();
    pen.fillStyle = "#333";
    pen.textAlign = "center";
    for (let i = -2; i <= 2; i++) {
      const v = i * limit / 2, label = v.toPrecision(2);
      pen.fillText(label, px(v), size - pad + 18);
      pen.save(); pen.translate(pad - 10, py(v)); pen.rotate(-Math.PI / 2); pen.fillText(label, 0, 0); pen.restore();
    }
    pen.fillText(`reference (${data.unit})`, size / 2, size - 12);
    pen.save(); pen.translate(14, size / 2); pen.rotate(-Math.PI / 2);
    pen.fillText(`predicted (${data.unit})`, 0, 0); pen.restore();
    for (const group of data.groups) {
      if (hidden.has(group.name)) continue;
      pen.fillStyle = group.colour;
      group.reference.forEach((x, i) => pen.fillRect(px(x) - 1.5, py(group.predicted[i]) - 1.5, 3, 3));
    }
    if (marked) {
      pen.strokeStyle = "#000"; pen.beginPath();
      pen.arc(px(marked.x), py(marked.y), 7, 0, 2 * Math.PI); pen.stroke();
    }
  }

  canvas.addEventListener("click", event => {
    const box = canvas.getBoundingClientRect(), scale = size / box.width;
    const cx = (event.clientX - box.left) * scale, cy = (event.clientY - box.top) * scale;
    let best = Infinity;
    for (const group of data.groups) {
      if (hidden.has(group.name)) continue;
      group.reference.forEach((x, i) => {
        const y = group.predicted[i], d = (px(x) - cx) ** 2 + (py(y) - cy) ** 2;
        if (d < best) { best = d; marked = { x, y, name: group.name }; }
      });
    }
    if (marked) out.textContent = `${marked.name}: reference ${marked.x.toFixed(4)}, predicted ` +
      `${marked.y.toFixed(4)}, error ${(marked.y - marked.x).toFixed(4)} ${data.unit}`;
    draw();
  });
  for (const button of root.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      const name = button.dataset.name;
      if (hidden.delete(name)) button.setAttribute("aria-pressed", "true");
      else { hidden.add(name); button.setAttribute("aria-pressed", "false"); }
      marked = null; out.textContent = ""; draw();
    });
  }
  draw();
}
