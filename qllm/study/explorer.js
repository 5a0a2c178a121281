/* The interactive figure: looks up, for a place of a text and a temperature, the next-token
   probabilities of all arms and the tokens that the shared noise picks. It reads the element
   play-data, whose shape play_file.py describes, and writes text only, never markup. */
"use strict";
(function () {
  var holder = document.getElementById("play-data");
  if (!holder) return;
  var data = JSON.parse(holder.textContent);
  var section = document.getElementById("explorer");
  var live = section.querySelector(".live");
  var SHOWN = 8;
  var state = { model: 0, prompt: 0, place: 0, t: 0 };

  function make(tag, kind, text) {
    var element = document.createElement(tag);
    if (kind) element.className = kind;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  function visible(piece) {
    var shown = piece.replace(/[\u0000-\u0009\u000b-\u001f\u007f-\u009f]/g, "\ufffd");
    return shown.replace(/ /g, "\u00b7").replace(/\n/g, "\u21b5") || "(no text)";
  }

  function percent(share) {
    return (100 * share).toFixed(share > 0 && share < 0.0995 ? 1 : 0) + "\u00a0%";
  }

  function prompts() { return data.models[state.model].prompts; }
  function places() { return prompts()[state.prompt].places; }
  function parts(place, name, t) {
    return place.arms[name].pick[t] !== place.arms[data.reference].pick[t];
  }

  /* arm -> token (its number in place.tokens) -> probability */
  function chances(place) {
    var temperature = data.temperatures[state.t], found = {};
    data.arms.forEach(function (arm) {
      var row = place.arms[arm.name];
      found[arm.name] = new Map(row.at.map(function (token, i) {
        return [token, Math.exp(row.logits[i] / temperature - row.log_z[state.t])];
      }));
    });
    return found;
  }

  /* the most probable tokens in any arm, and all that are picked */
  function shownTokens(place, found) {
    var highest = new Map();
    data.arms.forEach(function (arm) {
      found[arm.name].forEach(function (share, token) {
        highest.set(token, Math.max(share, highest.get(token) || 0));
      });
    });
    var picked = new Set(data.arms.map(function (arm) { return place.arms[arm.name].pick[state.t]; }));
    var ranked = Array.from(highest.keys()).sort(function (a, b) {
      return highest.get(b) - highest.get(a) || a - b;
    });
    return ranked.filter(function (token, i) { return i < SHOWN || picked.has(token); });
  }

  /* -------------------------------------------------------------- the controls, made once */

  function chooser(text, change) {
    var box = make("label", "choose", text + " ");
    var select = make("select");
    select.addEventListener("change", function () { change(select.selectedIndex); });
    box.appendChild(select);
    live.appendChild(box);
    return select;
  }

  function fill(select, names, chosen) {
    select.replaceChildren.apply(select, names.map(function (name) { return new Option(name); }));
    select.selectedIndex = chosen;
  }

  var modelSelect = chooser("model", function (i) {
    state.model = i;
    state.prompt = Math.min(state.prompt, prompts().length - 1);
    state.place = 0;
    draw(true);
  });
  var promptSelect = chooser("prompt", function (i) {
    state.prompt = i;
    state.place = 0;
    draw(true);
  });
  modelSelect.parentNode.hidden = data.models.length < 2;

  var context = make("p", "context");
  var steps = make("div", "steps");
  steps.setAttribute("role", "group");
  steps.setAttribute("aria-label", "place in the text of " + data.reference);
  var dial = make("label", "dial");
  var shownT = make("output");
  var slider = make("input");
  slider.type = "range";
  slider.min = 0;
  slider.max = data.temperatures.length - 1;
  slider.step = 1;
  slider.addEventListener("input", function () {
    state.t = Number(slider.value);
    draw(false);
  });
  dial.append("temperature ", shownT, slider);
  var said = make("p", "said");
  said.setAttribute("aria-live", "polite");
  var bars = make("div", "bars");
  var picks = make("ul", "picks");
  var strips = make("div", "strips");
  [context, steps, dial, said, bars, picks, strips].forEach(function (part) {
    live.appendChild(part);
  });

  /* ------------------------------------------------------------------- what is shown now */

  /* what the reference wrote at a place: the text is its greedy one */
  function mostProbable(place) {
    var row = place.arms[data.reference];
    return place.tokens[row.at[row.logits.indexOf(Math.max.apply(null, row.logits))]][1];
  }

  function drawSteps(place) {
    steps.replaceChildren.apply(steps, places().map(function (other, i) {
      var parted = data.arms.filter(function (arm) { return parts(other, arm.name, state.t); });
      var button = make("button", parted.length ? "parted" : "", visible(mostProbable(other)));
      button.type = "button";
      button.setAttribute("aria-pressed", String(i === state.place));
      button.title = parted.length ? parted.length + " arm(s) draw another token here"
        : "all arms draw the same token here";
      button.addEventListener("click", function () {
        state.place = i;
        draw(false);
        steps.children[i].focus();
      });
      return button;
    }));
    context.replaceChildren(
      make("span", "same", prompts()[state.prompt].text), place.context, make("b", "", " \u25ae"));
  }

  function drawBars(place, found) {
    var tokens = shownTokens(place, found), most = 0;
    data.arms.forEach(function (arm) {
      found[arm.name].forEach(function (share) { most = Math.max(most, share); });
    });
    bars.replaceChildren.apply(bars, tokens.map(function (token) {
      var line = make("div", "token");
      var group = make("div", "group");
      line.append(make("code", "", visible(place.tokens[token][1])), group);
      data.arms.forEach(function (arm) {
        var share = found[arm.name].get(token), picked = place.arms[arm.name].pick[state.t] === token;
        var bar = make("div", picked ? "bar picked" : "bar");
        var ink = make("i");
        ink.style.width = 86 * (share || 0) / most + "%";
        ink.style.background = arm.colour;
        ink.style.color = arm.colour;
        bar.title = arm.name + ": " + (share === undefined ? "not among its first" : percent(share)) +
          (picked ? ", drawn" : "");
        bar.appendChild(ink);
        group.appendChild(bar);
      });
      var plain = found[data.reference].get(token);
      line.appendChild(make("span", "share", plain === undefined ? "" : percent(plain)));
      return line;
    }));
  }

  function drawPicks(place, found) {
    picks.replaceChildren.apply(picks, data.arms.map(function (arm) {
      var pick = place.arms[arm.name].pick[state.t];
      var item = make("li", parts(place, arm.name, state.t) ? "parted" : "");
      var swatch = make("i", "swatch");
      swatch.style.background = arm.colour;
      var share = found[arm.name].get(pick);
      item.append(swatch, make("b", "", arm.name), " draws ",
        make("code", "", visible(place.tokens[pick][1])),
        share === undefined ? "" : " (" + percent(share) + ")");
      return item;
    }));
  }

  /* for every arm a row of squares, one for each temperature: filled where it parts */
  function drawStrips(place) {
    var lines = data.arms.filter(function (arm) { return arm.name !== data.reference; });
    strips.replaceChildren.apply(strips, [make("p", "small",
      "Temperatures at which an arm draws another token than " + data.reference + " here:")].concat(
      lines.map(function (arm) {
        var line = make("div", "strip");
        line.appendChild(make("span", "", arm.name));
        var cells = make("div", "cells");
        data.temperatures.forEach(function (temperature, t) {
          var cell = make("i", t === state.t ? "now" : "");
          if (parts(place, arm.name, t)) cell.style.background = arm.colour;
          cell.title = "temperature " + temperature;
          cell.addEventListener("click", function () {
            state.t = t;
            draw(false);
          });
          cells.appendChild(cell);
        });
        line.appendChild(cells);
        return line;
      }), [ends()]));
  }

  function ends() {
    var line = make("div", "strip small");
    var cells = make("div", "ends");
    cells.append(make("span", "", "T = " + data.temperatures[0]),
      make("span", "", String(data.temperatures[data.temperatures.length - 1])));
    line.append(make("span"), cells);
    return line;
  }

  function sentence(place) {
    var parted = data.arms.filter(function (arm) { return parts(place, arm.name, state.t); });
    var pick = place.tokens[place.arms[data.reference].pick[state.t]][1];
    var text = "At temperature " + data.temperatures[state.t] + ", " + data.reference + " draws \u201c" +
      visible(pick) + "\u201d; ";
    if (!parted.length) return text + "so do all other arms.";
    return text + parted.map(function (arm) { return arm.name; }).join(", ") +
      (parted.length === 1 ? " draws" : " draw") + " another token.";
  }

  function draw(lists) {
    if (lists) {
      fill(modelSelect, data.models.map(function (model) { return model.name; }), state.model);
      fill(promptSelect, prompts().map(function (prompt) { return prompt.id; }), state.prompt);
    }
    var place = places()[state.place], found = chances(place);
    slider.value = state.t;
    slider.setAttribute("aria-valuetext", "temperature " + data.temperatures[state.t]);
    shownT.textContent = data.temperatures[state.t].toFixed(2);
    drawSteps(place);
    drawBars(place, found);
    drawPicks(place, found);
    drawStrips(place);
    said.textContent = sentence(place);
  }

  /* begin where something happens: the first place and temperature near 0.8 at which arms part */
  function begin() {
    var near = data.temperatures.map(function (value, t) { return t; }).sort(function (a, b) {
      return Math.abs(data.temperatures[a] - 0.8) - Math.abs(data.temperatures[b] - 0.8);
    });
    state.t = near[0];
    near.some(function (t) {
      return places().some(function (place, i) {
        var found = data.arms.some(function (arm) { return parts(place, arm.name, t); });
        if (found) { state.t = t; state.place = i; }
        return found;
      });
    });
  }

  begin();
  draw(true);
  live.hidden = false;
  section.classList.add("js");
})();
