"use strict";
(() => {
  const study = JSON.parse(document.getElementById("data").textContent);
  const simulated = new URLSearchParams(location.search).has("simulated");  // marks answers that no person gave
  const at = id => document.getElementById(id);
  const now = () => performance.now() / 1000;
  let rater = "", list = [], state = null, videos = [], reference = null, current = 0, shownAt = 0, openedAt = null;

  const store = {  // a browser may refuse to keep anything; then the page works, and says so
    key: name => `avatar_rt.study.${study.study}.${name}`,
    read(name) { try { return JSON.parse(localStorage.getItem(this.key(name))); } catch { return null; } },
    write(name, value) {
      try { localStorage.setItem(this.key(name), JSON.stringify(value)); }
      catch { at("hint").textContent = "This browser keeps nothing: finish before you close the page."; }
    },
  };
  const make = (tag, name, text) => {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const show = id => { for (const s of ["welcome", "trial", "thanks"]) at(s).hidden = s !== id; };

  function enter(name) {
    rater = name;
    list = order.trials(study, rater);
    state = store.read("answers." + rater) || {started: new Date().toISOString(), finished: null, answers: []};
    store.write("rater", rater);
    advance();
  }

  function advance() {
    if (state.answers.length >= list.length) return finish();
    show("trial");
    const trial = list[state.answers.length];
    at("progress").value = state.answers.length / list.length;
    at("count").textContent = `${state.answers.length + 1} of ${list.length}`;
    at("screens").replaceChildren();
    videos = trial.videos.map((name, i) => screen(name, trial.videos.length > 1 ? ["left", "right"][i] : "", i > 0));
    reference = trial.reference ? screen(trial.reference, "the person, for reference", false, "reference") : null;
    at("show").hidden = !reference;
    askAll();
    shownAt = now();
    openedAt = null;
    label();
    window.scrollTo(0, 0);
  }

  function screen(name, caption, silent, kind) {
    const box = make("figure", kind), video = make("video");
    video.src = `videos/${name}.mp4`;
    video.preload = "auto";
    video.playsInline = true;
    video.disablePictureInPicture = true;
    video.muted = silent;  // two voices at once are no speech: the left one is heard
    video.plays = 0;
    video.addEventListener("ended", () => ended(video));
    video.addEventListener("play", label);
    video.addEventListener("pause", label);
    video.addEventListener("error", () => { at("hint").textContent = "This video cannot be played here. Please tell those who sent you."; });
    box.append(video);
    if (caption) box.append(make("figcaption", "", caption));
    at("screens").append(box);
    return video;
  }

  function ended(video) {
    let seen = 0;
    for (let i = 0; i < video.played.length; i++) seen += video.played.end(i) - video.played.start(i);
    if (seen >= 0.9 * video.duration) video.plays += 1;  // a jump to the end is no playthrough
    if (openedAt === null && videos.every(v => v.plays > 0)) open();
    label();
  }

  function open() {
    openedAt = now();
    for (const f of at("questions").elements) f.disabled = false;
    focus(0);
  }

  function label() {
    const playing = videos.some(v => !v.paused && !v.ended);
    at("play").lastElementChild.textContent = playing ? "Pause" : "Play";
    at("hint").textContent = openedAt !== null ? "" : videos.some(v => v.currentTime > 0) ? "Answers open at the end." : "Play to the end first.";
  }

  function toggle() {
    if (videos.some(v => !v.paused && !v.ended)) return videos.forEach(v => v.pause());
    if (reference) reference.pause();
    if (videos.every(v => v.ended)) videos.forEach(v => { v.currentTime = 0; });
    for (const v of videos) if (!v.ended) v.play().catch(() => {});
  }

  function again() {
    if (reference) reference.pause();
    for (const v of videos) { v.currentTime = 0; v.play().catch(() => {}); }
  }

  function showReference() {
    if (!reference) return;
    videos.forEach(v => v.pause());
    reference.currentTime = 0;
    reference.play().catch(() => {});
  }

  function askAll() {
    const scale = study.questions.length > 1;
    at("questions").replaceChildren(...study.questions.map((q, i) => {
      const box = make("fieldset"), legend = make("legend"), options = make("div", "options");
      box.disabled = true;
      box.dataset.question = q.key;
      legend.append(make("b", "", q.title), make("span", "soft small", q.text));
      if (q.low) options.append(make("span", "end", q.low));
      for (const [value, words, key] of q.options) {
        const holder = make("label"), input = make("input"), choice = make("span", "choice");
        Object.assign(input, {type: "radio", name: q.key, value: String(value)});
        input.setAttribute("aria-label", `${q.title}: ${words}`);
        input.addEventListener("change", () => { focus(Math.min(i + 1, study.questions.length - 1)); check(); });
        choice.textContent = words;
        if (!scale) choice.prepend(make("kbd", "", {ArrowLeft: "←", ArrowRight: "→", ArrowDown: "↓"}[key]), " ");
        holder.append(input, choice);
        options.append(holder);
      }
      if (q.high) options.append(make("span", "end", q.high));
      box.append(legend, options);
      box.addEventListener("focusin", () => mark(i));
      return box;
    }));
    at("keys").textContent = scale ? "1 to 5 answer the marked question, ↑ and ↓ move the mark" : "";
    mark(0);
    check();
  }

  const boxes = () => [...at("questions").querySelectorAll("fieldset")];
  function mark(i) { current = i; boxes().forEach((b, k) => b.classList.toggle("current", k === i)); }
  function focus(i) { mark(i); boxes()[i].scrollIntoView({block: "nearest"}); }

  function values() {
    const found = {};
    for (const q of study.questions) {
      const input = at("questions").querySelector(`input[name="${q.key}"]:checked`);
      if (input) found[q.key] = q.options.find(o => String(o[0]) === input.value)[0];
    }
    return found;
  }

  function check() { at("next").disabled = openedAt === null || Object.keys(values()).length < study.questions.length; }

  function answer() {
    check();
    if (at("next").disabled) return;
    const trial = list[state.answers.length], round = x => Math.round(x * 1000) / 1000;
    state.answers.push({
      trial: trial.id, place: state.answers.length, repeat: trial.repeat, videos: trial.videos, values: values(),
      plays: videos.map(v => v.plays), seconds: round(now() - shownAt), deciding: round(now() - openedAt),
    });
    store.write("answers." + rater, state);
    advance();
  }

  function result() {
    return {
      schema: "avatar_rt.study-answers/1", study: study.study, kind: study.kind, rater, simulated,
      started: state.started, finished: state.finished, trials: list.length, answers: state.answers,
    };
  }

  async function finish() {
    const first = state.finished === null;
    if (first) state.finished = new Date().toISOString();
    store.write("answers." + rater, state);
    show("thanks");
    if (!study.post || state.posted) {
      at("sent").textContent = study.post ? "Your answers have been sent." : "Please download your answers and send them to those who asked you.";
      return;
    }
    at("sent").textContent = "Sending your answers …";
    try {
      const reply = await fetch(study.post, {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(result())});
      if (!reply.ok) throw new Error(`the server said ${reply.status}`);
      state.posted = true;
      store.write("answers." + rater, state);
      at("sent").textContent = "Your answers have been sent.";
    } catch (error) {
      at("sent").textContent = `Your answers could not be sent (${error.message}). Please download them and send them to those who asked you.`;
    }
  }

  function download() {
    const link = make("a"), name = `answers-${study.study}-${rater}.json`;
    link.href = URL.createObjectURL(new Blob([JSON.stringify(result(), null, 1)], {type: "application/json"}));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  function press(event) {
    if (at("trial").hidden || event.ctrlKey || event.metaKey || event.altKey) return;
    const key = event.key, question = study.questions[current];
    const place = question.options.findIndex(o => o[2] === key);
    if (event.target.matches("button:focus-visible") && (key === " " || key === "Enter")) return;
    if (openedAt !== null && place >= 0) {
      const input = boxes()[current].querySelectorAll("input")[place];
      if (input.checked) focus(Math.min(current + 1, study.questions.length - 1)); else input.click();
    }
    else if (key === " ") toggle();
    else if (key === "r" || key === "R") again();
    else if (key === "f" || key === "F") showReference();
    else if (key === "Enter") answer();
    else if (key === "ArrowDown" && openedAt !== null) focus(Math.min(current + 1, study.questions.length - 1));
    else if (key === "ArrowUp" && openedAt !== null) focus(Math.max(current - 1, 0));
    else return;
    event.preventDefault();
  }

  document.addEventListener("keydown", press);
  at("enter").addEventListener("submit", event => { event.preventDefault(); enter(at("rater").value.trim().toLowerCase()); });
  at("questions").addEventListener("submit", event => event.preventDefault());
  for (const [id, act] of [["play", toggle], ["again", again], ["show", showReference], ["next", answer], ["download", download]]) {
    at(id).addEventListener("click", act);
  }
  at("rater").value = new URLSearchParams(location.search).get("rater") || store.read("rater") || "";
  if (location.protocol === "file:" && study.post) at("trouble").textContent = "Opened from the disk: the answers may have to be downloaded at the end.";
})();
