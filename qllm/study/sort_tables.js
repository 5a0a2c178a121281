/* Tables can be sorted by a press on a heading. Without this they are as they were computed. */
"use strict";
(function () {
  function key(row, column) {
    var cell = row.cells[column];
    if (!cell) return "";
    if (cell.dataset.v !== undefined) {
      var number = { inf: Infinity, "-inf": -Infinity }[cell.dataset.v];
      return number === undefined ? parseFloat(cell.dataset.v) : number;
    }
    return cell.textContent;
  }

  function before(a, b) {
    if (typeof a === "number" && typeof b === "number") {
      if (isNaN(a)) return isNaN(b) ? 0 : 1; /* what has no number comes last */
      return isNaN(b) ? -1 : a - b;
    }
    return String(a).localeCompare(String(b));
  }

  function sort(table, column, heading) {
    var rising = heading.getAttribute("aria-sort") !== "ascending";
    table.querySelectorAll("th[aria-sort]").forEach(function (other) {
      other.removeAttribute("aria-sort");
    });
    heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
    var body = table.tBodies[0];
    var rows = Array.prototype.map.call(body.rows, function (row, place) {
      return { row: row, key: key(row, column), place: place };
    });
    rows.sort(function (one, two) {
      var order = before(one.key, two.key);
      if (!rising && one.key === one.key && two.key === two.key) order = -order;
      return order || one.place - two.place;
    });
    rows.forEach(function (item) { body.appendChild(item.row); });
  }

  document.querySelectorAll("table.sortable").forEach(function (table) {
    if (table.tBodies[0].rows.length < 2) return;
    Array.prototype.forEach.call(table.tHead.rows[0].cells, function (heading, column) {
      var button = document.createElement("button");
      button.type = "button";
      button.title = "sort by " + heading.textContent;
      while (heading.firstChild) button.appendChild(heading.firstChild);
      heading.appendChild(button);
      button.addEventListener("click", function () { sort(table, column, heading); });
    });
  });
})();
