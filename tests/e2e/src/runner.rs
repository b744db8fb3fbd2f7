//! Runs scenarios on one stage; a failed one gets a fresh stage for the next.

use crate::pair::Setup;
use crate::scenarios::{ALL, Scenario};
use crate::stage::Stage;
use crate::story::tell;
use anyhow::{Result, bail};
use std::time::Instant;

/// Runs those whose names contain one of `only` (all where it is empty).
///
/// # Errors
/// One failed, or none of that name exists.
pub fn run(only: &[String]) -> Result<()> {
    let wanted =
        |s: &&Scenario| only.is_empty() || only.iter().any(|o| s.name.contains(o.as_str()));
    let chosen: Vec<&Scenario> = ALL.iter().filter(wanted).collect();
    if chosen.is_empty() {
        bail!("no scenario of that name; `havm-e2e list` names them");
    }
    let mut stage: Option<Stage> = None;
    let mut failed = Vec::new();
    let mut second_tries = Vec::new();
    for s in &chosen {
        tell(format!("{}: {}", s.name, s.what));
        let t = Instant::now();
        let mut result = play(s, &mut stage);
        if let Err(e) = &result {
            // Told in full, and counted at the end: a second try is no excuse for the first.
            tell(format!("{}: first try FAILED: {e:#}", s.name));
            if let Some(stage) = &stage {
                println!("{}", stage.pair.logs());
            }
            second_tries.push(s.name);
            stage = None;
            result = play(s, &mut stage);
        }
        match result {
            Ok(()) => tell(format!(
                "{}: ok ({:.0} s)",
                s.name,
                t.elapsed().as_secs_f64()
            )),
            Err(e) => {
                tell(format!("{}: FAILED: {e:#}", s.name));
                if let Some(stage) = &stage {
                    println!("{}", stage.pair.logs());
                }
                failed.push(s.name);
                stage = None;
            }
        }
    }
    drop(stage);
    if !second_tries.is_empty() {
        tell(format!("needed a second try: {}", second_tries.join(", ")));
    }
    if !failed.is_empty() {
        tell(format!("failed: {}", failed.join(", ")));
    }
    println!(
        "{} passed, {} failed",
        chosen.len() - failed.len(),
        failed.len()
    );
    if failed.is_empty() {
        Ok(())
    } else {
        bail!("{} scenarios failed", failed.len())
    }
}

fn play(s: &Scenario, stage: &mut Option<Stage>) -> Result<()> {
    let stage = match stage {
        Some(s) => s,
        None => stage.insert(Stage::set_up(&Setup {
            lab: "havm-e2e".into(),
            ..Setup::default()
        })?),
    };
    stage.heal()?;
    (s.play)(stage)?;
    stage.heal()
}
