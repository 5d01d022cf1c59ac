// A landscape that can be turned, read and seen: energies on the left, the molecule under the pointer on the right.
for (const root of document.querySelectorAll("[data-landscape]")) {
  const data = JSON.parse(root.querySelector("script[type='application/json']").textContent);
  const [chart, mol] = root.querySelectorAll("canvas"), out = root.querySelector("output");
  const W = 560, H = 460, M = 320;
  // at least two, so that a canvas prints sharply: what is printed are its pixels
  const ratio = Math.max(2, window.devicePixelRatio || 1);
  const flat = data.axes.length === 1;
  for (const [canvas, w, h] of [[chart, W, H], [mol, M, M]]) {
    canvas.width = w * ratio; canvas.height = h * ratio; canvas.getContext("2d").scale(ratio, ratio);
  }
  const pen = chart.getContext("2d"), brush = mol.getContext("2d");
  const nx = data.axes[0].values.length, ny = flat ? 1 : data.axes[1].values.length;
  const top = data.top || 1, known = data.energies.map(e => e !== null);
  const noisy = root.querySelector("button[data-noise]");
  let byNoise = noisy !== null, atoms = [], named = null;
  let turn = 0.7, tilt = 0.9, molTurn = 0.4, molTilt = 0.3, picked = data.lowest, spots = [];

  // dark to light, readable in grey as well
  const stops = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
  function colour(t) {
    const x = Math.min(Math.max(t, 0), 1) * (stops.length - 1), i = Math.min(Math.floor(x), stops.length - 2);
    return `rgb(${stops[i].map((c, k) => Math.round(c + (stops[i + 1][k] - c) * (x - i))).join(",")})`;
  }
  // i and j may lie between points of the grid, where the height is that of the nearest one
  function project(i, j, height) {
    const near = data.energies[Math.round(i) * ny + Math.round(j)];
    const x = i / (nx - 1) - 0.5, y = j / (ny - 1) - 0.5, z = (height === undefined ? near || 0 : height) / top;
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
      if (!corners.every(c => known[c])) continue;
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
    names();
    if (data.path) trail();
  }
  function names() {
    pen.fillStyle = "#333"; pen.font = "12px system-ui,sans-serif"; pen.textAlign = "center";
    data.axes.forEach((axis, k) => {
      // of the two edges along an axis the one nearer to the viewer carries the name
      const ends = k === 0 ? [[(nx - 1) / 2, -1], [(nx - 1) / 2, ny]] : [[-1, (ny - 1) / 2], [nx, (ny - 1) / 2]];
      const edges = ends.map(([i, j]) => {
        const x = i / (nx - 1) - 0.5, y = j / (ny - 1) - 0.5;
        return [i, j, Math.sin(turn) * x + Math.cos(turn) * y];
      }).sort((a, b) => b[2] - a[2]);
      const x = edges[0][0] / (nx - 1) - 0.5, y = edges[0][1] / (ny - 1) - 0.5, s = W * 0.62;
      const a = Math.cos(turn) * x - Math.sin(turn) * y, b = Math.sin(turn) * x + Math.cos(turn) * y;
      const v = axis.values, range = `${v[0].toPrecision(3)} to ${v[v.length - 1].toPrecision(3)} ${axis.unit}`;
      pen.fillText(`${axis.name}, ${range}`, Math.min(Math.max(W / 2 + a * s, 110), W - 110),
        Math.min(H * 0.62 + b * s * Math.cos(tilt) + 0.165 * s * Math.sin(tilt) + 14, H - 6));
    });
    pen.textAlign = "left";
    pen.fillText(`${data.quantity} 0 to ${top.toPrecision(3)} ${data.unit}, dark to light`, 8, 16);
  }
  function trail() {
    const place = (axis, value) => {
      const v = axis.values, n = v.length;
      return Math.min(Math.max((value - v[0]) / (v[n - 1] - v[0]) * (n - 1), 0), n - 1);
    };
    const points = data.path.map(([x, y]) => project(place(data.axes[0], x), place(data.axes[1], y)));
    for (const [width, style] of [[3, "#fff"], [1.2, "#000"]]) {
      pen.lineWidth = width; pen.strokeStyle = style; pen.beginPath();
      points.forEach(([x, y], i) => i ? pen.lineTo(x, y) : pen.moveTo(x, y));
      pen.stroke();
    }
    pen.lineWidth = 1;
  }
  function curve() {
    const pad = 56, v = data.axes[0].values, low = v[0], high = v[v.length - 1], axis = data.axes[0];
    const px = x => pad + (x - low) / (high - low) * (W - 2 * pad), py = e => H - pad - e / top * (H - 2 * pad);
    spots = v.map((x, i) => [px(x), py(data.energies[i] || 0), 0]);
    pen.strokeStyle = "#333"; pen.strokeRect(pad, pad, W - 2 * pad, H - 2 * pad);
    pen.fillStyle = "#333"; pen.font = "12px system-ui,sans-serif"; pen.textAlign = "center";
    for (let k = 0; k <= 4; k++) {
      const x = low + k / 4 * (high - low), e = k / 4 * top;
      pen.fillText(x.toPrecision(3), px(x), H - pad + 18);
      pen.fillText(e.toPrecision(2), pad - 22, py(e) + 4);
    }
    pen.fillText(`${axis.name} (${axis.unit})`, W / 2, H - 14);
    pen.save(); pen.translate(14, H / 2); pen.rotate(-Math.PI / 2);
    pen.fillText(`${data.quantity} (${data.unit})`, 0, 0); pen.restore();
    pen.save(); pen.beginPath(); pen.rect(pad, pad, W - 2 * pad, H - 2 * pad); pen.clip();
    const line = (values, style, dash) => {
      let open = false;
      pen.strokeStyle = style; pen.lineWidth = 2; pen.setLineDash(dash); pen.beginPath();
      values.forEach((e, i) => {
        if (e === null) { open = false; return; }
        if (open) pen.lineTo(px(v[i]), py(e)); else pen.moveTo(px(v[i]), py(e));
        open = true;
      });
      pen.stroke(); pen.lineWidth = 1; pen.setLineDash([]);
    };
    line(data.energies, colour(0.3), []);
    if (data.errors) bars(px, py);
    const styles = [[7, 4], [2, 3], [8, 3, 2, 3]];
    data.curves.forEach((c, k) => line(c.values, "#333", styles[k % styles.length]));
    pen.restore();
    pen.textAlign = "right";
    data.curves.forEach((c, k) => pen.fillText(`dashed: ${c.name}`, W - pad - 8, pad + 18 + 16 * k));
  }
  function bars(px, py) {
    pen.strokeStyle = colour(0.3); pen.beginPath();
    data.axes[0].values.forEach((value, i) => {
      if (!known[i] || data.errors[i] === null) return;
      const x = px(value), high = py(data.energies[i] + data.errors[i]), low = py(data.energies[i] - data.errors[i]);
      for (const [a, b, c, d] of [[x, low, x, high], [x - 3, low, x + 3, low], [x - 3, high, x + 3, high]]) {
        pen.moveTo(a, b); pen.lineTo(c, d);
      }
    });
    pen.stroke();
  }
  function draw() {
    pen.clearRect(0, 0, W, H);
    if (flat) curve(); else surface();
    pen.strokeStyle = "#fff"; pen.fillStyle = "#d55e00";
    pen.beginPath(); pen.arc(spots[picked][0], spots[picked][1], 6, 0, 2 * Math.PI); pen.fill(); pen.stroke();
    const place = flat ? [picked] : [Math.floor(picked / ny), picked % ny];
    const where = data.axes.map((a, k) => `${a.name} ${a.values[place[k]].toFixed(3)} ${a.unit}`).join(", ");
    const error = !data.errors ? "" : data.errors[picked] === null ? " (error not known)" :
      ` ± ${data.errors[picked].toFixed(4)}`;
    const height = known[picked] ? `${data.energies[picked].toFixed(4)}${error} ${data.unit}` : "not sampled";
    const others = data.curves.map(c => `, ${c.name} ${c.values[picked].toFixed(4)} ${data.unit}`).join("");
    const said = named === null ? "" : `; atom ${named}: ${data.symbols[named]}` +
      (data.noise ? `, noise ${data.noise[named].toFixed(4)} Å` : "");
    out.textContent = `${where}: ${height}${others}${said}`;
    molecule();
  }
  function molecule() {
    const xyz = data.frames[data.frameOf[picked]];
    brush.clearRect(0, 0, M, M);
    atoms = data.numbers.map((z, i) => {
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
      brush.fillStyle = byNoise ? data.noiseColours[atom.i] : data.colours[atom.z];
      brush.strokeStyle = atom.i === named ? "#d55e00" : "#333"; brush.lineWidth = atom.i === named ? 3 : 1;
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
      if (!known[k]) return;
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
  mol.addEventListener("click", event => {
    const [x, y] = at(event, mol, M);
    let best = Infinity;
    for (const atom of atoms) {
      const d = (atom.x - x) ** 2 + (atom.y - y) ** 2;
      if (d < best) { best = d; named = atom.i; }
    }
    draw();
  });
  if (noisy) noisy.addEventListener("click", () => {
    byNoise = !byNoise; noisy.setAttribute("aria-pressed", String(byNoise)); draw();
  });
  draw();
}
