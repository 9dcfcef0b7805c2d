package config

import (
	"fmt"
	"strings"
)

// Error is one mistake in a configuration, or in a name that was looked up
// in it. Line and Column count from 1; 0 means the mistake has no place.
type Error struct {
	File    string
	Line    int
	Column  int
	Message string
}

func (e *Error) Error() string {
	switch {
	case e.File == "":
		return e.Message
	case e.Line == 0:
		return e.File + ": " + e.Message
	}
	return fmt.Sprintf("%s:%d:%d: %s", e.File, e.Line, e.Column, e.Message)
}

// Errors is every mistake found in a file, in the order of the file.
type Errors []*Error

func (e Errors) Error() string {
	lines := make([]string, len(e))
	for i, one := range e {
		lines[i] = one.Error()
	}
	return strings.Join(lines, "\n")
}

// Unwrap lets errors.As find the single errors.
func (e Errors) Unwrap() []error {
	all := make([]error, len(e))
	for i, one := range e {
		all[i] = one
	}
	return all
}

// didYouMean is the end of an error about an unknown word: the nearest of the
// known ones if it is near, otherwise all of them if they are few.
func didYouMean(word string, known []string) string {
	if best := nearest(word, known); best != "" {
		return "; did you mean '" + best + "'?"
	}
	if len(known) == 0 || len(known) > 20 {
		return ""
	}
	return "; known: " + strings.Join(known, ", ")
}

// nearest returns the known word that a slip of the hand turns into word, or
// the empty string. One slip is allowed per three letters, two at least in
// words of four and more.
func nearest(word string, known []string) string {
	limit := max(1, len(word)/3)
	if len(word) >= 4 {
		limit = max(2, limit)
	}
	best := ""
	for _, candidate := range known {
		if d := slips(strings.ToLower(word), candidate); d <= limit {
			best, limit = candidate, d-1
		}
	}
	return best
}

// slips counts the insertions, deletions, replacements and exchanges of
// neighbours that turn a into b.
func slips(a, b string) int {
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			rows[i][j] = min(rows[i-1][j]+1, rows[i][j-1]+1, rows[i-1][j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				rows[i][j] = min(rows[i][j], rows[i-2][j-2]+1)
			}
		}
	}
	return rows[len(a)][len(b)]
}
