//! Times and sizes for people.

/// `2026-11-21 07:14:32Z`, from milliseconds since 1970.
pub fn stamp(ms: u64) -> String {
    let (days, s) = (ms / 86_400_000, ms / 1000 % 86_400);
    let (y, m, d) = civil(days);
    format!(
        "{y:04}-{m:02}-{d:02} {:02}:{:02}:{:02}Z",
        s / 3600,
        s / 60 % 60,
        s % 60
    )
}

/// Days since 1970 to year, month, day (Howard Hinnant's civil_from_days).
fn civil(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let era = z / 146_097;
    let doe = z % 146_097;
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (d, m) = (
        doy - (153 * mp + 2) / 5 + 1,
        if mp < 10 { mp + 3 } else { mp - 9 },
    );
    (yoe + era * 400 + u64::from(m <= 2), m, d)
}

/// `3 d 2 h`, `12 min`, `5 s`.
pub fn span(ms: u64) -> String {
    let s = ms / 1000;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        3600..86_400 => format!("{} h {} min", s / 3600, s / 60 % 60),
        _ => format!("{} d {} h", s / 86_400, s / 3600 % 24),
    }
}

/// `1.5 GiB`.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut v = n as f64;
    let mut u = 0;
    while v >= 1024.0 && u < UNITS.len() - 1 {
        v /= 1024.0;
        u += 1;
    }
    if u == 0 {
        format!("{n} B")
    } else {
        format!("{v:.1} {}", UNITS[u])
    }
}

/// `1.9 ms`, from microseconds.
pub fn micros(us: u64) -> String {
    if us < 1000 {
        format!("{us} us")
    } else {
        format!("{:.1} ms", us as f64 / 1000.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_sizes_read_well() {
        assert_eq!(stamp(0), "1970-01-01 00:00:00Z");
        assert_eq!(stamp(951_827_696_000), "2000-02-29 12:34:56Z");
        assert_eq!(stamp(1_795_244_400_000), "2026-11-21 07:00:00Z");
        assert_eq!(
            [span(999), span(61_000), span(7_260_000)],
            ["0 s", "1 min 1 s", "2 h 1 min"]
        );
        assert_eq!([bytes(512), bytes(1536)], ["512 B", "1.5 KiB"]);
        assert_eq!([micros(999), micros(1900)], ["999 us", "1.9 ms"]);
    }
}
