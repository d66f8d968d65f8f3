"use strict";
const RATE = 16000, FPS = 25, AHEAD_SECONDS = 2, KEPT_SECONDS = 30, PIECE = 1600;
const $ = (id) => document.getElementById(id);
const player = $("player");
let live = null;

function say(text) { $("status").textContent = text; }

async function post(url, fields) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) form.append(name, value);
  const answer = await fetch(url, { method: "POST", body: form });
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error.message);
  return body;
}

const toBytes = (samples) => Int16Array.from(samples, (x) => Math.max(-1, Math.min(1, x)) * 32767);

// What the server sends, appended to what plays; more is asked for while less than AHEAD_SECONDS wait.
class Screen {
  constructor(mime, grant) {
    if (!MediaSource.isTypeSupported(mime)) throw new Error(`This browser cannot play ${mime}.`);
    this.parts = [];
    this.asked = 0;
    this.grant = grant;
    this.source = new MediaSource();
    player.src = URL.createObjectURL(this.source);
    this.source.addEventListener("sourceopen", () => {
      this.buffer = this.source.addSourceBuffer(mime);
      this.buffer.addEventListener("updateend", () => this.next());
      this.next();
    }, { once: true });
    this.timer = setInterval(() => this.ask(), 50);
    player.play().catch((e) => say(e.message));
  }

  add(bytes, seekTo) {
    this.parts.push({ bytes, seekTo });
    this.next();
  }

  next() {
    if (!this.buffer || this.buffer.updating || this.source.readyState !== "open") return;
    if (this.seekTo !== undefined) { player.currentTime = this.seekTo; this.seekTo = undefined; }
    const old = player.currentTime - KEPT_SECONDS, ranges = this.buffer.buffered;
    if (ranges.length && ranges.start(0) < old - KEPT_SECONDS) { this.buffer.remove(0, old); return; }
    const part = this.parts.shift();
    if (part) { this.seekTo = part.seekTo; this.buffer.appendBuffer(part.bytes); }
    else if (this.done) { this.source.endOfStream(); clearInterval(this.timer); }
  }

  ask() {
    const ranges = player.buffered;
    const ahead = ranges.length ? ranges.end(ranges.length - 1) - player.currentTime : 0;
    if (this.asked <= 0 && ahead < AHEAD_SECONDS) { this.asked++; this.grant(1); }
  }

  finish() { this.done = true; this.next(); }
}

// One live session: sound goes out as far as the server has room for it, video comes in.
class Live {
  constructor(reference, more) {
    this.limit = this.sent = this.generation = 0;
    this.waiting = [];
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    this.socket = new WebSocket(`${scheme}://${location.host}/v1/live`);
    this.socket.binaryType = "arraybuffer";
    this.socket.onopen = () => this.tell({
      type: "session.open", version: 1, reference_id: reference, sample_rate: RATE, ...more,
    });
    this.socket.onmessage = ({ data }) => (typeof data === "string" ? this.hear(JSON.parse(data)) : this.show(data));
    this.socket.onclose = () => this.close();
  }

  tell(message) { if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message)); }

  hear(message) {
    if (message.audio_limit !== undefined) { this.limit = message.audio_limit; this.flush(); }
    if (message.type === "media_init") {
      try { this.screen = new Screen(message.mime, (chunks) => this.tell({ type: "credit", chunks })); }
      catch (e) { say(e.message); this.tell({ type: "session.cancel" }); return; }
      this.screen.asked = 2;  // the server's first credit
    }
    if (message.type === "media_init" || message.type === "chunk") this.about = message;
    if (message.type === "error") say(message.message);
    if (message.type === "session.ended" && message.reason === "complete") say("Done.");
  }

  show(bytes) {
    const about = this.about;
    if (!this.screen) return;
    if (about.type === "chunk") {
      this.screen.asked--;
      say(`Chunk ${about.chunk_index}, frames ${about.start_frame} to ${about.start_frame + about.frames - 1}`);
    }
    const first = about.type === "chunk" && about.generation_id !== this.generation;
    if (first) this.generation = about.generation_id;  // what was said before the interruption is not played out
    this.screen.add(bytes, first ? about.start_frame / FPS : undefined);
  }

  push(samples) { if (this.closed) return; this.waiting.push(samples); this.flush(); }

  flush() {
    while (this.waiting.length && this.sent + this.waiting[0].length <= this.limit) {
      const samples = this.waiting.shift();
      this.sent += samples.length;
      this.socket.send(toBytes(samples));
    }
    if (this.ending && !this.waiting.length) { this.ending = false; this.tell({ type: "audio.end" }); }
  }

  end() { this.ending = true; this.flush(); }

  interrupt() { this.waiting = []; this.tell({ type: "interrupt" }); }

  close() {
    if (this.closed) return;
    this.closed = true;
    if (this.screen) this.screen.finish();
    if (this.stopSound) this.stopSound();
    if (live === this) { live = null; buttons(); }
    this.socket.close();
  }
}

function buttons() {
  const ready = !live && $("video").files.length > 0;
  $("file").disabled = !ready || !$("sound").files.length;
  $("microphone").disabled = !ready;
  $("interrupt").disabled = $("stop").disabled = !live;
}

async function start(sound, more) {
  try {
    live = {};  // taken
    buttons();
    say("Reading the video ...");
    const { id } = await post("/v1/references", { video: $("video").files[0] });
    const steps = $("steps").value;
    const opened = new Live(id, { ...more, ...(steps ? { steps: Number(steps) } : {}) });
    live = opened;
    say("Waiting for the first frames ...");
    await sound(opened);
  } catch (e) {
    say(e.message);
    live = live && live.close ? live : null;
  }
  buttons();
}

async function sayFile(session) {
  const context = new AudioContext({ sampleRate: RATE });
  const decoded = await context.decodeAudioData(await $("sound").files[0].arrayBuffer());
  await context.close();
  const mono = new Float32Array(decoded.length);
  for (let c = 0; c < decoded.numberOfChannels; c++) {
    decoded.getChannelData(c).forEach((x, i) => { mono[i] += x / decoded.numberOfChannels; });
  }
  for (let at = 0; at < mono.length; at += PIECE) session.push(mono.subarray(at, at + PIECE));
  session.end();
}

async function listen(session) {
  const stream = await navigator.mediaDevices.getUserMedia({ audio: { echoCancellation: true } });
  const context = new AudioContext({ sampleRate: RATE });
  await context.audioWorklet.addModule("/microphone.js");
  const node = new AudioWorkletNode(context, "microphone");
  node.port.onmessage = ({ data }) => session.push(data);
  context.createMediaStreamSource(stream).connect(node);
  session.stopSound = () => { stream.getTracks().forEach((track) => track.stop()); context.close(); };
  if (session.closed) session.stopSound();
}

$("video").onchange = $("sound").onchange = buttons;
$("file").onclick = () => start(sayFile, {});
$("microphone").onclick = () => start(listen, { idle_after: 0.5 });
$("interrupt").onclick = () => live && live.interrupt && live.interrupt();
$("stop").onclick = () => live && live.close && live.close();
buttons();
