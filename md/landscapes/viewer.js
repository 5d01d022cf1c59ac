// A landscape that can be turned, read and seen: energies on the left, the molecule under the pointer on the right.
for (const root of document.querySelectorAll("[data-landscape]")) {
  const data = JSON.parse(root.querySelector("script[type='application/json']").textContent);
  const [chart, mol] = root.querySelectorAll("canvas"), out = root.querySelector("output");
  const W = 560, H = 460, M = 320, ratio = window.devicePixelRatio || 1;
  const flat = data.axes.length === 1;
  for (const [canvas, w, h] of [[chart, W, H], [mol, M, M]]) {
    canvas.width = w * ratio; canvas.height = h * ratio; canvas.getContext("2d").scale(ratio, ratio);
  }
  const pen = chart.getContext("2d"), brush = mol.getContext("2d");
  const nx = data.axes[0].values.length, ny = flat ? 1 : data.axes[1].values.length;
  const top = data.energies.reduce((a, b) => Math.max(a, b), 0) || 1;
  let turn = 0.7, tilt = 0.9, molTurn = 0.4, molTilt = 0.3, picked = data.lowest, spots = [];

  // dark to light, readable in grey as well
  const stops = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
  function colour(t) {
    const x = Math.min(Math.max(t, 0), 1) * (stops.length - 1), i = Math.min(Math.floor(x), stops.length - 2);
    return `rgb(${stops[i].map((c, k) => Math.round(c + (stops[i + 1][k] - c) * (x - i))).join(",")})`;
  }
  function project(i, j) {
    const x = i / (nx - 1) - 0.5, y = j / (ny - 1) - 0.5, z = data.energies[i * ny + j] / top;
    const a = Math.cos(turn) * x - Math.sin(turn) * y, b = Math.sin(turn) * x + Math.cos(turn) * y;
    const s = W * 0.56;
    return [W / 2 + a * s, H * 0.62 + b * s * Math.cos(tilt) - (z - 0.3) * s * 0.55 * Math.sin(tilt), b];
  }
  function surface() {
    spots = [];
    for (let i = 0; i < nx; i++) for (let j = 0; j < ny; j++) spots.push(project(i, j));
    const cells = [];
    for (let i = 0; i + 1 < nx; i++) for (let j = 0; j + 1 < ny; j++) {
      const k = i * ny + j, corners = [k, k + 1, k + ny + 1, k + ny];
      cells.push([corners, corners.reduce((s, c) => s + spots[c][2], 0)]);
    }
    cells.sort((a, b) => a[1] - b[1]);
    for (const [corners] of cells) {
      const mean = corners.reduce((s, c) => s + data.energies[c], 0) / 4;
      pen.fillStyle = pen.strokeStyle = colour(mean / top);
      pen.beginPath();
      corners.forEach((c, k) => k ? pen.lineTo(spots[c][0], spots[c][1]) : pen.moveTo(spots[c][0], spots[c][1]));
      pen.closePath(); pen.fill(); pen.stroke();
    }
  }
  function curve() {
    const pad = 50, v = data.axes[0].values, low = v[0], high = v[v.length - 1];
    spots = v.map((x, i) =>
      [pad + (x - low) / (high - low) * (W - 2 * pad), H - pad - data.energies[i] / top * (H - 2 * pad), 0]);
    pen.strokeStyle = "#333"; pen.strokeRect(pad, pad, W - 2 * pad, H - 2 * pad);
    pen.strokeStyle = colour(0.3); pen.lineWidth = 2; pen.beginPath();
    spots.forEach(([x, y], i) => i ? pen.lineTo(x, y) : pen.moveTo(x, y));
    pen.stroke(); pen.lineWidth = 1;
  }
  function draw() {
    pen.clearRect(0, 0, W, H);
    if (flat) curve(); else surface();
    pen.strokeStyle = "#fff"; pen.fillStyle = "#d55e00";
    pen.beginPath(); pen.arc(spots[picked][0], spots[picked][1], 6, 0, 2 * Math.PI); pen.fill(); pen.stroke();
    const place = flat ? [picked] : [Math.floor(picked / ny), picked % ny];
    const where = data.axes.map((a, k) => `${a.name} ${a.values[place[k]].toFixed(3)} ${a.unit}`).join(", ");
    out.textContent = `${where}: ${data.energies[picked].toFixed(4)} ${data.unit}`;
    molecule();
  }
  function molecule() {
    const xyz = data.frames[data.frameOf[picked]];
    brush.clearRect(0, 0, M, M);
    const atoms = data.numbers.map((z, i) => {
      const [x, y, w] = [xyz[3 * i], xyz[3 * i + 1], xyz[3 * i + 2]];
      const a = Math.cos(molTurn) * x - Math.sin(molTurn) * y, b = Math.sin(molTurn) * x + Math.cos(molTurn) * y;
      return { x: M / 2 + a * data.size, y: M / 2 + (b * Math.sin(molTilt) - w * Math.cos(molTilt)) * data.size,
        depth: b * Math.cos(molTilt) + w * Math.sin(molTilt), z, i };
    });
    brush.strokeStyle = "#888"; brush.lineWidth = 3;
    for (const [i, j] of data.bonds) {
      brush.beginPath(); brush.moveTo(atoms[i].x, atoms[i].y); brush.lineTo(atoms[j].x, atoms[j].y); brush.stroke();
    }
    for (const atom of [...atoms].sort((p, q) => p.depth - q.depth)) {
      brush.fillStyle = data.colours[atom.z]; brush.strokeStyle = "#333"; brush.lineWidth = 1;
      brush.beginPath(); brush.arc(atom.x, atom.y, data.radii[atom.z] * data.size, 0, 2 * Math.PI);
      brush.fill(); brush.stroke();
    }
  }
  function at(event, canvas, width) {
    const box = canvas.getBoundingClientRect(), s = width / box.width;
    return [(event.clientX - box.left) * s, (event.clientY - box.top) * s];
  }
  function pick(event) {
    const [x, y] = at(event, chart, W);
    let best = Infinity;
    spots.forEach(([a, b], k) => {
      const d = (a - x) ** 2 + (b - y) ** 2;
      if (d < best) { best = d; picked = k; }
    });
    draw();
  }
  function drag(canvas, moved) {
    let last = null;
    canvas.addEventListener("pointerdown", e => { last = [e.clientX, e.clientY]; canvas.setPointerCapture(e.pointerId); });
    canvas.addEventListener("pointerup", () => { last = null; });
    canvas.addEventListener("pointermove", e => {
      if (last && (e.buttons & 1)) { moved(e.clientX - last[0], e.clientY - last[1]); last = [e.clientX, e.clientY]; draw(); }
      else if (canvas === chart) pick(e);
    });
  }
  drag(chart, (dx, dy) => { if (!flat) { turn += dx / 150; tilt = Math.min(Math.max(tilt + dy / 200, 0), 1.5); } });
  drag(mol, (dx, dy) => { molTurn += dx / 100; molTilt += dy / 100; });
  chart.addEventListener("click", pick);
  draw();
}
