// Hands the microphone's samples to the page, 20 ms at a time.
class Microphone extends AudioWorkletProcessor {
  constructor() {
    super();
    this.piece = new Float32Array(320);
    this.filled = 0;
  }

  process([[channel]]) {
    for (const sample of channel || []) {
      this.piece[this.filled++] = sample;
      if (this.filled === this.piece.length) {
        this.port.postMessage(this.piece.slice());
        this.filled = 0;
      }
    }
    return true;
  }
}
registerProcessor("microphone", Microphone);
