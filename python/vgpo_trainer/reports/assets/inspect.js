"use strict";
// Shows what the token under the pointer looks at: its map over the image, its numbers, its place on the curves.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const count = data.tokens.length;
  const places = data.columns ? atob(data.levels).length / count : 0;
  const levels = Uint8Array.from(atob(data.levels), (character) => character.charCodeAt(0));
  const tokens = [...document.querySelectorAll("#tokens .token")];
  const cells = [...document.querySelectorAll("#map rect")];
  const bars = [...document.querySelectorAll("#shares i")];
  const show = (id, text) => { document.getElementById(id).textContent = text; };
  const percent = (value, digits = 1) => (value === null ? "–" : `${(100 * value).toFixed(digits)}%`);
  const signed = (value) => (value === null ? "–" : `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`);
  const mean = (values) => {
    const known = values.filter((value) => value !== null);
    return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
  };

  // Dark to bright, over the image.
  const colours = [[17, 11, 66], [104, 24, 112], [190, 52, 86], [244, 124, 32], [252, 232, 112]];
  const colour = (share) => {
    const place = Math.min(Math.max(share, 0), 1) * (colours.length - 1);
    const index = Math.min(Math.floor(place), colours.length - 2);
    const mix = colours[index].map((from, channel) => from + (place - index) * (colours[index + 1][channel] - from));
    return `rgb(${mix.map(Math.round).join(",")})`;
  };

  const cursors = [...document.querySelectorAll(".curves .chart")].map((chart) => {
    const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
    line.setAttribute("class", "cursor");
    line.setAttribute("y1", data.chart.top);
    line.setAttribute("y2", data.chart.bottom);
    chart.append(line);
    return { chart, line };
  });

  // The attention on one place of the image: of a token, or of the whole answer on average.
  const strength = (token, place) => {
    if (token !== null) return (levels[token * places + place] / 255) * (data.peaks[token] ?? 0);
    let sum = 0;
    for (let index = 0; index < count; index += 1) sum += strength(index, place);
    return sum / count;
  };

  const look = (token) => {
    tokens.forEach((element, index) => element.classList.toggle("here", index === token));
    const pick = (values) => (token === null ? mean(values) : values[token]);
    show("what", token === null ? "the whole answer" : `${token + 1} of ${count}:  ${JSON.stringify(data.tokens[token])}`);
    ["image", "question", "generated"].forEach((name, place) => {
      const share = pick(data.shares.map((row) => row[place]));
      show(name, percent(share));
      bars[place].style.flexGrow = share ?? 0;
    });
    show("cos", signed(pick(data.cos)));
    show("psi", signed(pick(data.psi)));
    const factor = pick(data.factors);
    show("factor", factor === null ? "–" : factor.toFixed(2));
    const map = cells.map((_, place) => strength(token, place));
    const peak = Math.max(...map, 0);
    cells.forEach((cell, place) => { cell.style.fill = colour(peak > 0 ? map[place] / peak : 0); });
    if (cells.length) show("peak", percent(peak));
    cursors.forEach(({ line }) => {
      const x = data.chart.left + ((token ?? 0) / (data.chart.last - 1)) * data.chart.width;
      line.setAttribute("x1", x);
      line.setAttribute("x2", x);
      line.style.display = token === null ? "none" : "";
    });
  };

  let held = null;
  const hold = (token) => {
    held = token;
    tokens.forEach((element, index) => element.classList.toggle("held", index === token));
    look(token);
  };
  tokens.forEach((element, index) => {
    element.addEventListener("pointerenter", () => look(index));
    element.addEventListener("focus", () => look(index));
    element.addEventListener("click", () => hold(held === index ? null : index));
    element.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step) { event.preventDefault(); tokens[index + step]?.focus(); }
      if (event.key === "Enter") hold(held === index ? null : index);
      if (event.key === "Escape") hold(null);
    });
  });
  document.getElementById("tokens").addEventListener("pointerleave", () => look(held));
  cursors.forEach(({ chart }) => {
    chart.addEventListener("pointermove", (event) => {
      const box = chart.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * chart.viewBox.baseVal.width - data.chart.left;
      look(Math.min(Math.max(Math.round((x / data.chart.width) * (data.chart.last - 1)), 0), count - 1));
    });
    chart.addEventListener("pointerleave", () => look(held));
  });

  document.getElementById("overlay")?.addEventListener("change", (event) => {
    document.getElementById("picture").classList.toggle("plain", !event.target.checked);
  });

  // page.html#token=3 opens with the third token held.
  const asked = Number(new URLSearchParams(location.hash.slice(1)).get("token"));
  hold(asked >= 1 && asked <= count ? asked - 1 : null);
})();
