// The live lists: scores of `recommend` plus the reader's moves times the items' standardised scores.
(() => {
  const place = document.getElementById("live-data");
  if (!place) return;
  const data = JSON.parse(place.textContent);
  const floats = (text) => new Float32Array(Uint8Array.from(atob(text), (one) => one.charCodeAt(0)).buffer);
  const scores = floats(data.scores), standard = floats(data.standard);
  const items = data.items.length, aspects = data.aspects.length;
  const moves = new Array(aspects).fill(0);
  let user = 0, before = new Map();

  const element = (tag, text, parent, className) => {
    const made = document.createElement(tag);
    if (text) made.textContent = text;
    if (className) made.className = className;
    parent.append(made);
    return made;
  };
  const signed = (value) => (value < 0 ? "" : "+") + value.toFixed(2);

  const ranked = () => {
    const found = [];
    for (let i = 0; i < items; i++) {
      let score = scores[user * items + i];
      if (isNaN(score)) continue;
      for (let a = 0; a < aspects; a++) score += moves[a] * standard[i * aspects + a];
      found.push([score, i]);
    }
    return found.sort((left, right) => right[0] - left[0] || left[1] - right[1]).slice(0, data.length).map((one) => one[1]);
  };

  const reasons = (item) => {
    const terms = data.aspects.map((name, a) =>
      [(data.users[user].looks_for[a] + moves[a]) * standard[item * aspects + a], name]);
    const known = terms.filter((one) => one[0] >= data.users[user].least_term).sort((left, right) => right[0] - left[0]);
    const words = known.slice(0, data.terms).map(([term, name]) => name + " " + signed(term));
    return words.join(", ") || "no aspect speaks for it";
  };

  const root = document.getElementById("live");
  root.replaceChildren();
  const controls = element("div", "", root, "controls");
  const list = element("div", "", root);

  const who = element("label", "User ", controls);
  const choice = element("select", "", who);
  data.users.forEach((one, number) => { element("option", one.id, choice).value = number; });
  const newest = element("p", "", controls, "soft");
  const sliders = data.aspects.map((name, a) => {
    const label = element("label", "", controls, "slider");
    element("span", name, label);
    const slider = element("input", "", label);
    slider.type = "range";
    slider.min = -data.limit;
    slider.max = data.limit;
    slider.step = 0.1;
    slider.value = 0;
    const shown = element("output", "", label);
    slider.addEventListener("input", () => { moves[a] = parseFloat(slider.value); draw(); });
    return { slider, shown };
  });
  const reset = element("button", "Back to the user's own", controls);
  reset.type = "button";

  const heading = element("p", "", list, "caption");
  const entries = element("ol", "", list);
  const call = element("code", "", element("p", "", list, "soft"));
  entries.setAttribute("aria-live", "polite");

  const draw = () => {
    const chosen = data.users[user], moved = moves.some((one) => one);
    newest.textContent = "Newest: " + chosen.newest.join("; ");
    sliders.forEach(({ slider, shown }, a) => {
      shown.textContent = signed(chosen.looks_for[a] + moves[a]);
      shown.title = "looks for " + signed(chosen.looks_for[a]) + ", moved by " + signed(moves[a]);
      shown.classList.toggle("moved", moves[a] !== 0);
    });
    heading.textContent = "The best items of user " + chosen.id + (moved ? ", steered" : "");
    const order = ranked();
    if (!moved) before = new Map(order.map((item, rank) => [item, rank]));
    entries.replaceChildren();
    order.forEach((item, rank) => {
      const entry = element("li", "", entries);
      entry.dataset.item = data.items[item].id;
      element("span", data.items[item].title, entry, "title");
      if (moved) {
        const up = before.has(item) ? before.get(item) - rank : null;
        const words = up === null ? "new" : up > 0 ? "▲ " + up : up < 0 ? "▼ " + -up : "";
        if (words) element("span", " " + words, entry, up === null || up > 0 ? "up" : "down");
      }
      element("span", reasons(item), entry, "why");
    });
    const steer = data.aspects.flatMap((name, a) => moves[a] ? [JSON.stringify(name) + ": " + moves[a]] : []);
    call.textContent = "recommender.recommend(" + JSON.stringify(chosen.id) + (steer.length ? ", steer={" + steer.join(", ") + "}" : "") + ")";
  };
  const clear = () => {
    moves.fill(0);
    sliders.forEach(({ slider }) => { slider.value = 0; });
    draw();
  };
  choice.addEventListener("change", () => { user = parseInt(choice.value, 10); clear(); });
  reset.addEventListener("click", clear);
  clear();
})();
