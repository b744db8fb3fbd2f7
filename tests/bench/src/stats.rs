//! Order statistics of a row of measurements.

use serde::Serialize;

/// What is told of a row.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// How many.
    pub n: usize,
    /// What one of ten does not exceed: on a machine with other users, nearest to what havm itself takes.
    pub p10: f64,
    /// The median.
    pub p50: f64,
    /// What nine of ten do not exceed.
    pub p90: f64,
    /// What 99 of 100 do not exceed.
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

/// Of a row; none of an empty one.
pub fn spread(row: impl IntoIterator<Item = f64>) -> Option<Spread> {
    let mut v: Vec<f64> = row.into_iter().collect();
    v.sort_by(f64::total_cmp);
    let at = |p: usize| {
        let rank = (v.len() * p).div_ceil(100).max(1) - 1;
        v.get(rank).copied().map(round)
    };
    Some(Spread {
        n: v.len(),
        p10: at(10)?,
        p50: at(50)?,
        p90: at(90)?,
        p99: at(99)?,
        max: at(100)?,
    })
}

/// The median; none of an empty row.
pub fn median(row: impl IntoIterator<Item = f64>) -> Option<f64> {
    spread(row).map(|s| s.p50)
}

/// To three places: more would be noise in the report.
pub fn round(x: f64) -> f64 {
    (x * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A percentile that is off by one would make every figure look better or worse than it was.
    #[test]
    fn percentiles_by_nearest_rank() {
        assert_eq!(spread([]), None);
        let s = spread((1..=100).rev().map(f64::from)).unwrap();
        assert_eq!((s.p10, s.p50, s.p90), (10.0, 50.0, 90.0));
        assert_eq!((s.p99, s.max), (99.0, 100.0));
        assert_eq!(median([3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median([7.0]), Some(7.0));
    }
}
