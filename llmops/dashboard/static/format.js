// Numbers and times for people; a dash for what is not known.

export const known = (value) => value !== null && value !== undefined;
const trimmed = (value, digits) => String(Number(value.toPrecision(digits)));

export function number(value, digits = 4) {
  if (typeof value !== "number") return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return Number(value.toPrecision(digits - 1)).toExponential().replace("e+", "e");
  return trimmed(value, digits);
}

/** Four digits, zeros included, so that numbers below one another can be compared. */
export function figure(value) {
  const fits = typeof value === "number" && Math.abs(value) >= 1e-3 && Math.abs(value) < 1e4;
  return fits ? value.toPrecision(4) : number(value);
}

export const count = (value) => (typeof value === "number" ? value.toLocaleString("en-US") : "–");

/** 1234567 as 1.23M. */
export function compact(value) {
  if (typeof value !== "number") return "–";
  for (const [size, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= size) return `${trimmed(value / size, 3)}${unit}`;
  }
  return trimmed(value, 3);
}

export function bytes(value) {
  if (typeof value !== "number") return "–";
  for (const [size, unit] of [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (value >= size) return `${trimmed(value / size, 3)} ${unit}`;
  }
  return `${value} B`;
}

export function percent(share, digits = 0) {
  return typeof share === "number" ? `${(share * 100).toFixed(digits)} %` : "–";
}

/** 42s, 3m, 5h 20m, 2d 4h. */
export function duration(seconds) {
  if (typeof seconds !== "number") return "–";
  const whole = Math.max(0, Math.floor(seconds));
  if (whole < 60) return `${whole}s`;
  const minutes = Math.floor(whole / 60), hours = Math.floor(whole / 3600), days = Math.floor(whole / 86400);
  if (hours === 0) return `${minutes}m`;
  if (days === 0) return `${hours}h ${minutes % 60}m`;
  return `${days}d ${hours % 24}h`;
}

const two = (value) => String(value).padStart(2, "0");
/** Local date and time. */
export function moment(epoch) {
  if (typeof epoch !== "number") return "–";
  const at = new Date(epoch * 1000);
  return `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} ${two(at.getHours())}:${two(at.getMinutes())}`;
}

/** A value of a configuration or of a parameter. */
export function literal(value) {
  if (!known(value)) return "–";
  if (typeof value === "number") return number(value);
  return typeof value === "string" ? value : JSON.stringify(value);
}
