"use strict";
(() => {
  const read = document => JSON.parse(document.getElementById("content").textContent);
  let content = read(document);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const live = new Map();  // figure -> its drawn view
  const turns = new WeakMap();  // figure -> how often it was begun to be drawn: an older drawing comes too late
  let chosen = new Set(content.arms.slice(0, content.shown));
  const strict = document.documentElement.dataset.live !== undefined;  // a server's policy lets no text be evaluated
  const every = (selector, inside = document) => [...inside.querySelectorAll(selector)];

  // tables are kept by column; a view gets rows of its own, since Vega marks the rows it is given
  function rows(table) {
    const columns = Object.entries(table.c).map(([name, c]) => [name, Array.isArray(c) ? i => c[i] : i => c.u[c.i[i]]]);
    return Array.from({length: table.n}, (_, i) => Object.fromEntries(columns.map(([name, at]) => [name, at(i)])));
  }
  function arms() { return content.arms.filter(arm => chosen.has(arm)); }

  async function draw(figure) {
    const chart = content.charts[figure.dataset.chart], spec = structuredClone(chart.spec);
    document.documentElement.classList.toggle("dark", dark.matches);  // paper is white, what is drawn stays as it is
    spec.datasets = Object.fromEntries(Object.entries(chart.tables).map(([name, table]) => [name, rows(table)]));
    for (const p of spec.params ?? []) if (p.name === "arms") p.value = arms();
    const before = live.get(figure), turn = (turns.get(figure) ?? 0) + 1;
    turns.set(figure, turn);
    live.set(figure, before ?? {finalize() {}});
    // a chart that is drawn again stays to be seen until the new one is there
    const old = figure.querySelector(".chart:not(.stage)"), place = before?.view ? old.cloneNode(false) : old;
    if (place !== old) {
      place.classList.add("stage");
      place.style.top = `${old.offsetTop}px`;
      old.after(place);
    }
    const said = old.getAttribute("aria-label");
    try {
      const drawn = await vegaEmbed(place, spec, {
        config: content.themes[dark.matches ? "dark" : "light"], mode: "vega-lite", renderer: "canvas", actions: false,
        tooltip: {theme: dark.matches ? "dark" : "light", disableDefaultStyle: true}, defaultStyle: false,
        ast: strict, logLevel: 1,  // errors only
      });
      if (turns.get(figure) !== turn) {
        drawn.finalize();
        if (place !== old) place.remove();
        return;
      }
      before?.finalize();
      if (place !== old) {
        old.remove();
        place.classList.remove("stage");
        place.style.top = "";
      }
      live.set(figure, drawn);
      figure.dataset.drawn = "true";
      save(figure);
      place.setAttribute("aria-label", said);  // the sentence of data, not the renderer's own words
      every("[role]", place).forEach(e => { e.removeAttribute("role"); e.removeAttribute("aria-roledescription"); e.removeAttribute("aria-label"); });
    } catch (error) {
      place.textContent = "This chart could not be drawn: " + error.message;
      console.error(error);
    }
  }
  function save(figure) {
    if (figure.querySelector(".save")) return;
    const button = document.createElement("button"), title = figure.querySelector("h3").textContent;
    Object.assign(button, {type: "button", className: "save", textContent: "PNG"});
    button.setAttribute("aria-label", "PNG: save " + title);
    button.addEventListener("click", async () => {
      const link = document.createElement("a");
      link.href = await live.get(figure).view.toImageURL("png", 2);
      link.download = title.replace(/\W+/g, "_").slice(0, 60) + ".png";
      link.click();
    });
    figure.append(button);
  }
  const figures = () => every("figure[data-chart]");
  const seen = new IntersectionObserver(entries => {
    for (const entry of entries) if (entry.isIntersecting && !live.has(entry.target)) draw(entry.target);
  }, {rootMargin: "400px"});
  figures().forEach(figure => seen.observe(figure));
  // a printer does not wait for charts to be drawn: those out of view follow while nothing else is to do
  const idle = window.requestIdleCallback ?? (work => setTimeout(work, 100));
  const rest = () => {
    const next = figures().find(f => !f.hidden && !live.has(f) && f.getClientRects().length);
    if (next) draw(next).finally(() => idle(rest));
  };
  addEventListener("load", () => idle(rest));
  dark.addEventListener("change", () => [...live.keys()].forEach(draw));

  function group(section) { return document.querySelector(`select.groups[data-section="${section}"]`)?.value; }
  function hide() {
    for (const part of [...figures(), ...every(".ramp")]) {
      const {arm, group: own, section} = part.dataset;
      part.hidden = (arm !== undefined && !chosen.has(arm)) || (own !== undefined && (group(section) ?? own) !== own);
    }
    for (const line of every("tr[data-arm]")) line.hidden = !chosen.has(line.dataset.arm);
  }
  addEventListener("change", event => { if (event.target.matches("select.groups")) hide(); });

  // tables: a click on a heading sorts by its column, another one the other way round; what has no value stays last
  function sort(head, up) {
    const body = head.closest("table").tBodies[0], at = head.cellIndex;
    every("th", head.parentNode).forEach(th => th.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => {
      const cell = row.cells[at], v = cell.dataset.v;
      return v === undefined ? cell.textContent.trim() : v === "" ? null : Number(v);
    };
    const lines = [...body.rows].map((row, i) => [value(row), i, row]);
    const none = v => v === null || v === "–";
    lines.sort(([a, i], [b, j]) => none(a) - none(b) || (none(a) ? 0 : (typeof a === "number" ? a - b : a.localeCompare(b, "en", {numeric: true})) * (up ? 1 : -1)) || i - j);
    body.append(...lines.map(line => line[2]));
  }
  addEventListener("click", event => {
    const head = event.target.closest("button.sort")?.closest("th");
    if (head) sort(head, head.getAttribute("aria-sort") !== "ascending");
  });

  // the filter of arms
  const boxes = () => every("#filter input[type=checkbox]");
  const found = () => boxes().filter(b => !b.closest("label").hidden);
  const find = () => document.getElementById("find");
  function choose() {
    boxes().forEach(b => { b.checked = chosen.has(content.arms[b.value]); });
    const count = document.getElementById("count"), said = `${chosen.size} of ${content.arms.length} arms shown`;
    if (count && count.textContent !== said) count.textContent = said;
    hide();
    for (const [figure, {view}] of live) {
      const filtered = (content.charts[figure.dataset.chart].spec.params ?? []).some(p => p.name === "arms");
      if (view && filtered) view.signal("arms", arms()).runAsync();
    }
  }
  function narrow() {
    const words = find().value.toLowerCase().split(/\s+/);
    boxes().forEach(b => { b.closest("label").hidden = !words.every(w => content.arms[b.value].toLowerCase().includes(w)); });
  }
  const filter = document.getElementById("filter");
  if (filter) {
    const buttons = {
      all: () => found().forEach(b => chosen.add(content.arms[b.value])),
      none: () => found().forEach(b => chosen.delete(content.arms[b.value])),
      only: () => { chosen = new Set(found().map(b => content.arms[b.value])); },
    };
    filter.addEventListener("click", event => {
      const act = buttons[event.target.id];
      if (act) { act(); choose(); }
    });
    filter.addEventListener("change", ({target}) => {
      if (target.type !== "checkbox") return;
      chosen[target.checked ? "add" : "delete"](content.arms[target.value]);
      choose();
    });
    filter.addEventListener("input", event => { if (event.target === find()) narrow(); });
    // headings stop below it, however high it is
    new ResizeObserver(() => document.documentElement.style.setProperty("--sticky", filter.offsetHeight + "px")).observe(filter);
    addEventListener("beforeprint", () => { filter.querySelector("details").open = true; });
  }
  if (!boxes().length) chosen = new Set(content.arms);
  choose();

  // --- a page of a server: sections that have changed are replaced; what the reader has set stays --------------------

  if (!strict) return;
  const EVERY = 2000;  // ms
  let version = document.documentElement.dataset.live;
  const sections = () => every("main > section");
  const name = section => section.getAttribute("aria-labelledby");
  const called = text => text.replace(/\d[\d,.]*/g, "#");  // "All 9 runs" is what "All 6 runs" was
  const title = figure => JSON.stringify([called(figure.querySelector("h3").textContent), figure.dataset.arm, figure.dataset.group]);
  const label = table => called(table.getAttribute("aria-label"));
  const focusable = "a, button, input, select, summary, [tabindex]";

  // the new section with the figures, unfolded details, choices and sorted tables of the old one; gives what is to be
  // done once it stands in the page
  function carryOver(section, old) {
    const after = [], known = new Map(every("figure[data-chart]", old).map(figure => [title(figure), figure]));
    for (const figure of every("figure[data-chart]", section)) {
      const drawn = known.get(title(figure));
      if (!drawn) continue;
      known.delete(title(figure));
      const changed = drawn.dataset.chart !== figure.dataset.chart;
      drawn.dataset.chart = figure.dataset.chart;
      drawn.className = figure.className;
      drawn.querySelector(".chart").setAttribute("aria-label", figure.querySelector(".chart").getAttribute("aria-label"));
      drawn.querySelector("figcaption")?.remove();
      drawn.querySelector("h3").textContent = figure.querySelector("h3").textContent;
      const caption = figure.querySelector("figcaption");
      if (caption) drawn.querySelector(".chart").after(caption);
      figure.replaceWith(drawn);
      if (changed && live.has(drawn)) after.push(() => draw(drawn));
    }
    const unfolded = new Set(every("details[open] > summary", old).map(s => called(s.textContent)));
    every("details > summary", section).forEach(s => { s.parentNode.open = unfolded.has(called(s.textContent)); });
    every("select", section).forEach((select, i) => { const was = every("select", old)[i]; if (was) select.value = was.value; });
    const tables = new Map(every(".scroll", old).map(e => [label(e), e]));
    for (const place of every(".scroll", section)) {
      const was = tables.get(label(place));
      if (!was) continue;
      const {scrollTop, scrollLeft} = was, sorted = was.querySelector("th[aria-sort]");
      const head = sorted && every("th", place).find(th => th.textContent === sorted.textContent);
      if (head) sort(head, sorted.getAttribute("aria-sort") === "ascending");
      after.push(() => { place.scrollTop = scrollTop; place.scrollLeft = scrollLeft; });
    }
    const at = every(focusable, old).indexOf(document.activeElement);
    if (at >= 0) after.push(() => every(focusable, section)[at]?.focus({preventScroll: true}));
    return after;
  }

  function replace(next) {
    const before = content;
    content = read(next);
    const added = content.arms.filter(arm => !before.arms.includes(arm));
    const kept = content.arms.filter(arm => chosen.has(arm));
    chosen = new Set([...kept, ...added.slice(0, Math.max(0, content.shown - kept.length))]);
    // what the reader looks at stays where it is
    const seenFirst = sections().find(s => s.getBoundingClientRect().bottom > 60);
    const at = seenFirst && [name(seenFirst), seenFirst.getBoundingClientRect().top];
    document.title = next.title;
    document.querySelector("header").replaceWith(document.adoptNode(next.querySelector("header")));
    const newFilter = next.getElementById("filter");
    if (filter && newFilter && newFilter.dataset.digest !== filter.dataset.digest) {
      const open = filter.querySelector("details").open, words = find()?.value, focus = document.activeElement === find();
      filter.replaceChildren(...document.adoptNode(newFilter).childNodes);
      filter.dataset.digest = newFilter.dataset.digest;
      filter.querySelector("details").open = open;
      if (words && find()) { find().value = words; narrow(); }
      if (focus) find()?.focus({preventScroll: true});
    }
    const main = document.querySelector("main"), after = [], old = new Map(sections().map(s => [name(s), s]));
    [...next.querySelectorAll("main > section")].forEach((section, i) => {
      const known = old.get(name(section));
      old.delete(name(section));
      let node = known;
      if (!known || known.dataset.digest !== section.dataset.digest) {
        node = document.adoptNode(section);
        if (known) { after.push(...carryOver(node, known)); known.replaceWith(node); }
      }
      if (main.children[i] !== node) main.insertBefore(node, main.children[i] ?? null);
    });
    old.forEach(section => section.remove());
    for (const [figure, drawn] of live) if (!figure.isConnected) { drawn.finalize(); live.delete(figure); }
    choose();
    after.forEach(act => act());
    figures().forEach(figure => seen.observe(figure));
    const now = at && document.getElementById(at[0])?.closest("section");
    if (now) scrollBy(0, now.getBoundingClientRect().top - at[1]);
  }

  const status = document.getElementById("live"), words = status.textContent;
  const say = text => { if (status.textContent !== text) status.textContent = text; };
  async function ask() {
    try {
      if (!document.hidden) {
        const answer = await fetch(location.href, {headers: {"If-None-Match": `"${version}"`}, cache: "no-store"});
        if (answer.status === 200) {
          const next = new DOMParser().parseFromString(await answer.text(), "text/html");
          // a page with another filter or none begins anew
          if (!next.documentElement.dataset.live || !next.getElementById("filter") !== !filter) return location.reload();
          version = next.documentElement.dataset.live;
          replace(next);
        }
        say(answer.ok || answer.status === 304 ? words : `The server answers ${answer.status}: this is what it last said.`);
      }
    } catch (error) {
      if (!(error instanceof TypeError)) console.error(error);  // of fetch: nobody answers
      say("The server does not answer: this is what it last said.");
    }
    setTimeout(ask, EVERY);
  }
  setTimeout(ask, EVERY);
})();
