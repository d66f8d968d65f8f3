"use strict";
(() => {
  const FPS = 25, DRIFT = 0.5 / FPS;  // half a frame apart is out of step
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = id => document.getElementById(id);
  const stage = at("stage"), screens = at("screens"), pick = at("case"), seek = at("seek"), speed = at("speed");
  let videos = [], heard = 0, current = -1, playing = false, muted = false;

  const make = (tag, text, name) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (name) node.className = name;
    return node;
  };
  const format = value => value === null || value === undefined ? "–" : Number(value.toPrecision(3)).toString().replace("-", "−");
  const cost = (m, v) => m.better === "higher" ? -v : m.better === "lower" ? v : Math.abs(v - m.target);
  const longest = () => videos.reduce((a, v) => v.duration > (a ? a.duration : 0) ? v : a, null);

  function show(index) {
    if (index < 0 || index >= data.cases.length) return;
    stop();
    current = index;
    pick.selectedIndex = index;
    const found = data.cases[index];
    const names = ["reference", "target", ...data.systems];
    for (const name of Object.keys(found.videos)) if (!names.includes(name)) names.push(name);
    const told = data.systems.filter(s => !(s in found.videos));
    screens.replaceChildren();
    videos = [];
    for (const name of names.filter(n => n in found.videos)) {
      const box = make("figure"), video = make("video"), caption = make("figcaption", name);
      video.src = found.videos[name];
      video.preload = "auto";
      video.playsInline = true;
      video.dataset.system = name;
      const place = videos.length;
      caption.append(make("kbd", String(place + 1)));
      video.addEventListener("click", () => listen(place));
      box.append(video, caption);
      screens.append(box);
      videos.push(video);
    }
    for (const name of told) {
      const box = make("figure");
      box.append(make("div", "no video", "absent"), make("figcaption", name));
      screens.append(box);
    }
    listen(Math.max(0, videos.findIndex(v => v.dataset.system !== "reference")));
    setSpeed();
    tabulate(found.name);
  }

  function tabulate(name) {
    const table = at("values"), of = data.values[name] || {};
    const head = make("tr");
    head.append(make("th", "Measure of " + name), ...data.systems.map(s => make("th", s)));
    const body = data.measures.map(m => {
      const line = make("tr"), costs = {};
      for (const s of data.systems) {
        const v = of[s] && of[s].values[m.key];
        if (v !== null && v !== undefined) costs[s] = cost(m, v);
      }
      const best = Math.min(...Object.values(costs));
      line.append(make("th", m.title), ...data.systems.map(s =>
        make("td", of[s] && of[s].status !== "ok" ? of[s].status : format(of[s] && of[s].values[m.key]), costs[s] === best ? "best" : "")));
      return line;
    });
    const top = make("thead"), rest = make("tbody");
    top.append(head);
    rest.append(...body);
    table.replaceChildren(top, rest);
  }

  function listen(place) {
    heard = place;
    videos.forEach((v, i) => {
      v.muted = muted || i !== heard;
      v.parentElement.classList.toggle("heard", i === heard && !muted);
    });
  }

  function setSpeed() { for (const v of videos) v.playbackRate = Number(speed.value); }

  function stop() {
    playing = false;
    at("toggle").textContent = "Play";
    for (const v of videos) v.pause();
  }

  function play() {
    const lead = longest();
    if (!lead) return;
    if (lead.ended || lead.currentTime >= lead.duration - 1e-3) go(0);
    playing = true;
    at("toggle").textContent = "Pause";
    for (const v of videos) if (v.currentTime < v.duration) v.play().catch(() => {});
  }

  function go(seconds) {
    for (const v of videos) if (v.duration) v.currentTime = Math.min(Math.max(0, seconds), v.duration);
  }

  function frame(step) {
    stop();
    const lead = longest();
    if (lead) go((Math.round(lead.currentTime * FPS) + step + 0.01) / FPS);  // just inside the frame, whatever the rounding
  }

  function tick() {  // the longest video leads; another is moved only when it is out of step, for a seek is heard
    const lead = longest();
    if (lead) {
      if (playing) {
        for (const v of videos) {
          if (v !== lead && lead.currentTime < v.duration && Math.abs(v.currentTime - lead.currentTime) > DRIFT * 2) v.currentTime = lead.currentTime;
        }
        if (lead.ended) stop();
      }
      if (document.activeElement !== seek) seek.value = String(Math.round(1000 * lead.currentTime / lead.duration));
      at("time").textContent = `${lead.currentTime.toFixed(2)} s · frame ${Math.floor(lead.currentTime * FPS + 0.02)}`;
    }
    requestAnimationFrame(tick);
  }

  const keys = {
    " ": () => playing ? stop() : play(), ArrowLeft: () => frame(-1), ArrowRight: () => frame(1), Home: () => go(0),
    j: () => show(current + 1), k: () => show(current - 1), m: () => { muted = !muted; listen(heard); },
    s: () => { speed.selectedIndex = (speed.selectedIndex + 1) % speed.options.length; setSpeed(); },
  };
  stage.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (["SELECT", "BUTTON", "INPUT"].includes(event.target.tagName) && [" ", "ArrowLeft", "ArrowRight", "Home"].includes(event.key)) return;
    const act = keys[event.key] || keys[event.key.toLowerCase()];
    const place = Number(event.key) - 1;
    if (act) act(); else if (place >= 0 && place < videos.length) listen(place); else return;
    event.preventDefault();
  });
  at("toggle").addEventListener("click", () => { keys[" "](); stage.focus(); });
  at("previous").addEventListener("click", keys.k);
  at("next").addEventListener("click", keys.j);
  speed.addEventListener("change", () => { setSpeed(); stage.focus(); });
  pick.addEventListener("change", () => { show(pick.selectedIndex); stage.focus(); });
  seek.addEventListener("input", () => { stop(); const lead = longest(); if (lead) go(seek.value / 1000 * lead.duration); });
  seek.addEventListener("change", () => stage.focus());
  document.addEventListener("click", event => {
    const name = event.target.dataset && event.target.dataset.case;
    if (!name) return;
    show(data.cases.findIndex(c => c.name === name));
    at("player").scrollIntoView();
    stage.focus({preventScroll: true});
    play();
  });
  for (const c of data.cases) pick.append(make("option", c.name));
  show(0);
  tick();
})();
