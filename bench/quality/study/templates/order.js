"use strict";
// A rater's own order, from their name and the study's: the same on every machine and after every return.
const order = (() => {
  function source(text) {  // FNV-1a of the text starts Marsaglia's xorshift: 0 <= number < 1
    let state = 2166136261;
    for (let i = 0; i < text.length; i++) state = Math.imul(state ^ text.charCodeAt(i), 16777619);
    state = state >>> 0 || 1;
    const next = () => {
      state ^= state << 13; state >>>= 0;
      state ^= state >>> 17;
      state ^= state << 5; state >>>= 0;
      return state / 4294967296;
    };
    for (let i = 0; i < 16; i++) next();  // names that differ in one letter have parted by then
    return next;
  }

  function shuffle(list, random) {
    const out = list.slice();
    for (let i = out.length - 1; i > 0; i--) {
      const j = Math.floor(random() * (i + 1));
      [out[i], out[j]] = [out[j], out[i]];
    }
    return out;
  }

  function apart(list) {  // no case twice in a row, as far as that can be
    for (let i = 1; i < list.length; i++) {
      if (list[i].group !== list[i - 1].group) continue;
      const j = list.findIndex((t, k) => k > i && t.group !== list[i - 1].group);
      if (j > 0) [list[i], list[j]] = [list[j], list[i]];
    }
    return list;
  }

  // [{id, videos, group, reference, repeat}]: whole cases up to per_rater, shuffled; repeats come in the last third.
  function trials(study, rater) {
    const random = source(study.study + "/" + rater);
    let chosen = study.trials;
    if (study.per_rater) {
      const groups = shuffle([...new Set(chosen.map(t => t.group))], random);
      const taken = new Set();
      for (const g of groups) {
        if (chosen.filter(t => taken.has(t.group)).length >= study.per_rater) break;
        taken.add(g);
      }
      chosen = chosen.filter(t => taken.has(t.group));
    }
    const list = apart(shuffle(chosen, random)).map(t => ({...t, videos: shuffle(t.videos, random), repeat: false}));
    const again = shuffle(list.slice(0, Math.max(1, Math.floor(list.length / 2))), random)
      .slice(0, Math.max(1, Math.round(study.repeats * list.length)));
    for (const t of again) {
      const from = Math.max(Math.ceil(2 * list.length / 3), list.indexOf(t) + 2);
      const place = from + Math.floor(random() * (list.length - from + 1));
      list.splice(place, 0, {...t, videos: t.videos.slice().reverse(), repeat: true});
    }
    return list;
  }
  return {trials};
})();
